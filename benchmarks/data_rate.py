"""How fast is a large file read, checked, split and written, in how much memory, and how fast is pandas' own reader?

    python benchmarks/data_rate.py FOLDER [--rows 1000000] [--seed 0] [--bad 0.03] [--out benchmarks/data_rate.csv]

Makes FOLDER/pairs_ROWS.jsonl from the simulator's texts (`write_lines`), unless it is there already. Then, each in a
process of its own, so that memory is its own too: `data_stage`, as `make run` calls it, with the seconds of its parts;
`read_tables` alone; and `pandas.read_json(lines=True)` on the lines that pandas can read at all (it raises at the first
broken one), which checks, splits and writes nothing. Writes one row of the table for each of the three: rows, seconds
of CPU (user and system), rows a second, peak memory in MB (`ru_maxrss` of the whole process), rows accepted, rejected.
Seconds are of the processor, since a clock on the wall times what else the machine does.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from grpo_engage.base.core import child_seed, say, write_csv
from grpo_engage.data.simulator import simulate_pairs

CONVERSATIONS = 4000  # simulated once; every further round says the same in other words
STEMS = "ba be bi bo ka ke ko la le lo ma me mi mo na ne no pa pe po ra re ri ro sa se so ta te ti to va ve vi".split()
BAD = ("cut", "negative", "missing", "null text", "not UTF-8", "same id", "count as text", "bare &", "no object")
UNREADABLE = ("cut", "not UTF-8", "no object")  # pandas raises, or makes a table of another shape


class Speaker:
    """Says texts in words of its own: about half of the words of four letters or more become others, always the same,
    and all numbers change. `seed` decides."""

    def __init__(self, seed: int):
        self.random, self.words = random.Random(seed), {}

    def _word(self, found: re.Match) -> str:
        word = found[0]
        if word.isdigit():
            return str(self.random.randrange(1, 90))
        if word not in self.words:
            made = "".join(self.random.choices(STEMS, k=self.random.randrange(2, 5)))
            self.words[word] = made if self.random.random() < 0.5 else word
        return self.words[word]

    def say(self, text: str) -> str:
        return re.sub(r"[0-9]+|\b[a-z]{4,}\b", self._word, text)


def spoilt(kind: str, record: dict, first_id: str) -> bytes:
    """The line of `record`, damaged in the way `kind`."""
    changes = {"negative": {"reply_likes": -1}, "null text": {"reply": None}, "same id": {"reply_id": first_id},
               "count as text": {"tweet_likes": "12"}, "bare &": {"reply": "this &amp; that & more"}}
    if kind == "missing":
        record = {name: value for name, value in record.items() if name != "reply_likes"}
    line = json.dumps(record | changes.get(kind, {}), ensure_ascii=False).encode()
    return {"cut": line[: len(line) // 2], "not UTF-8": line.replace(b"reply", b"r\xe9ply", 1),
            "no object": b"[" + line + b"]"}.get(kind, line)  # fmt: skip


def lines(rows: int, seed: int, bad: float) -> Iterator[tuple[bytes, str]]:
    """`rows` lines and, for each, "" or the kind of BAD that it is; the same arguments give the same lines.

    One conversation in forty is said in the words of the simulator, so that there are near-copies to be found.
    """
    base = [group.drop(columns="conversation_id").to_dict("records")
            for _, group in simulate_pairs(CONVERSATIONS, seed).groupby("conversation_id", sort=False)]
    chance, made, first_id = random.Random(child_seed(seed, "data_rate")), 0, "c0-0"
    while True:
        for number, conversation in enumerate(base):
            name = f"c{made}"
            speaker = Speaker(child_seed(seed, name))
            say_it = str if chance.random() < 0.025 else speaker.say
            mark = chance.choice(["", "", "", " 🙂", " …", " é", " &amp; so on"])
            post = say_it(conversation[0]["tweet"]) + mark
            for place, record in enumerate(conversation):
                record = record | {"tweet": post, "reply": say_it(record["reply"]) + mark,
                                   "conversation_id": name, "reply_id": f"{name}-{place}",
                                   "meta": {"round": made // len(base), "number": number}}  # fmt: skip
                kind = chance.choice(BAD) if made and chance.random() < bad else ""
                yield (spoilt(kind, record, first_id) if kind
                       else json.dumps(record, ensure_ascii=False).encode()), kind  # fmt: skip
                made += 1
                if made == rows:
                    return


def write_lines(folder: Path, rows: int, seed: int, bad: float) -> tuple[Path, Path]:
    """pairs_ROWS.jsonl, and readable_ROWS.jsonl without the lines that pandas cannot read; made where missing."""
    paths = folder / f"pairs_{rows}.jsonl", folder / f"readable_{rows}.jsonl"
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with open(paths[0], "wb") as every, open(paths[1], "wb") as readable:
            for line, kind in lines(rows, seed, bad):
                every.write(line + b"\n")
                if kind not in UNREADABLE:
                    readable.write(line + b"\n")
    return paths


def run_stage(path: Path, folder: Path) -> dict:
    """Seconds of CPU of `data_stage` and of its parts, and the rows that it accepted and rejected."""
    from grpo_engage.data import pairs as stage

    spent = {}

    def timed(name: str, function):
        def call(*arguments, **named):
            start = time.process_time()
            result = function(*arguments, **named)
            spent[name] = spent.get(name, 0.0) + time.process_time() - start
            return result
        return call

    parts = {"reading": "_read", "splitting": "split_conversations", "near_copies": "near_copies",
             "picture": "draw_margins", "simulating_for_the_picture": "_simulated", "parquet": "write_parquet"}
    for name, function in parts.items():
        setattr(stage, function, timed(name, getattr(stage, function)))
    start = time.process_time()
    table = stage.data_stage(folder, source="file", data_path=str(path))
    seconds = time.process_time() - start
    rejected = sum(1 for _ in open(folder / "data" / "rejected.csv", encoding="utf-8")) - 1
    return {"seconds": seconds, "accepted": len(table), "rejected": rejected,
            "detail": "; ".join(f"{name} {value:.1f}" for name, value in spent.items())}


def run_reading(path: Path, folder: Path) -> dict:
    """Seconds of CPU of `read_tables` and `tables`."""
    from grpo_engage.data.reading import read_tables

    start = time.process_time()
    accepted, rejected = read_tables(path).tables()
    return {"seconds": time.process_time() - start, "accepted": len(accepted), "rejected": len(rejected)}


def run_pandas(path: Path, folder: Path) -> dict:
    """Seconds of CPU of pandas' reader on the readable lines."""
    start = time.process_time()
    table = pd.read_json(path, lines=True)
    return {"seconds": time.process_time() - start, "accepted": len(table), "rejected": 0}


RUNS = {"data_stage": run_stage, "read_tables": run_reading, "pandas.read_json": run_pandas}


def measure(what: str, path: Path) -> dict:
    """One of RUNS in a process of its own, with its peak memory."""
    command = [sys.executable, __file__, str(path), "--only", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["accepted"] + found["rejected"]
    return {"what": what, "rows": rows, "cpu_seconds": round(found["seconds"], 1),
            "rows_per_second": round(rows / found["seconds"]), "peak_mb": found["peak_mb"],
            "megabytes": round(path.stat().st_size / 1e6), **{k: found[k] for k in ("accepted", "rejected")},
            "detail": found.get("detail", "")}  # fmt: skip


def main() -> None:
    """Measure, print, and append to the table; with --only (its own processes), one of RUNS on a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bad", type=float, default=0.03, help="share of rows that are spoilt")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        with tempfile.TemporaryDirectory(prefix="grpo_engage_data_rate_") as folder:
            found = RUNS[given.only](given.folder, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(found | {"peak_mb": peak}))
        return
    table = []
    for rows in given.rows:
        every, readable = write_lines(given.folder, rows, given.seed, given.bad)
        for what in RUNS:
            table.append(measure(what, readable if what.startswith("pandas") else every))
            say(", ".join(f"{name} {value}" for name, value in table[-1].items()))
    write_csv(given.out, pd.DataFrame(table))


if __name__ == "__main__":
    main()
