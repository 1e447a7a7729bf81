"""Do two commits make the same results? A small run of all stages and four arms from each, compared byte for byte.

    python proofs/golden.py OLD [NEW]      two commits (default NEW: HEAD); about five minutes each on two cores

Both run on this machine, in a checkout at the same path, with the same packages. Compared is every file of the run but
executed notebooks, manifests, logs, settings and the paper as a whole; in tables, what is time, money or the commit is
passed over. Keeps each commit's run in the folder given by --out and takes it from there the next time; writes
golden.csv (path, old, new) there and says which files differ; exit code 1 if any does. A step that means to change a
result names these files in docs/log.md.
"""

import argparse
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SETTINGS = ["arms=[baseline, polychromic, grpo, hybrid]", "n_seeds=2", "n_conversations=200",
            "max_steps=4", "train.hybrid.advantage=max_at_k", "train.polychromic.diversity_metric=vendi",
            "n_test_posts=6", "n_validation_posts=6", "n_samples=16", "n_boot=200",
            "train.max_new_tokens=16", "evaluation.max_new_tokens=16", "allow_unvalidated_reward=true",
            "best_of_n_posts=4", "best_of_n_replies=16", "rivals=[real, prompted, best_of_n]", "temperatures=[0.7]",
            "embeddings=true", "watch_posts=2", "watch_every=2"]
# Not results, or not only of the settings: what is executed, recorded, timed or paid for.
ASIDE = re.compile(r"\.ipynb$|(^|/)manifest\.json$|\.log$|^config\.json$|^\.|/\.|/tensorboard/|\.tfevents|"
                   r"^paper/(main\.pdf|main\.typ|macros\.tex)$")
TIMED = re.compile(r"^(Training time|Time,|Cost|Git commit|Price)")  # lines of the paper's tables
SECONDS = re.compile(r",[^,]*$")  # the last column of costs.csv


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each result of a run, by its path."""
    found = {}
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        name, content = path.relative_to(run_dir).as_posix(), path.read_bytes()
        if ASIDE.search(name):
            continue
        if path.suffix == ".tex":
            lines = content.decode().splitlines()
            content = "\n".join(line for line in lines if not TIMED.match(line)).encode()
        elif name.endswith("costs.csv"):
            content = "\n".join(SECONDS.sub("", line) for line in content.decode().splitlines()).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def run(commit: str, place: Path, settings: list[str]) -> Path:
    """The run of `commit`, made in `place`/tree; returns its folder."""
    tree = place / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(REPO), str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "checkout", "--quiet", commit], check=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1",
                                "GRPO_ENGAGE_RUNS": str(place / "runs")}
    shutil.rmtree(place / "runs", ignore_errors=True)
    words = [word for text in settings for word in ("-p", text)]
    subprocess.run([sys.executable, "-m", "grpo_engage", "run", "--preset", "smoke", "--run", "golden", *words],
                   cwd=tree, env=environment, check=True)
    return place / "runs" / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "grpo_engage_golden")
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="further settings of both runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sides = []
    for commit in (args.old, args.new):
        commit = subprocess.run(["git", "-C", str(REPO), "rev-parse", commit], capture_output=True, text=True,
                                check=True).stdout.strip()
        kept = args.out / "-".join([commit[:12], *args.p]).replace("/", "_")
        if not kept.exists():
            shutil.move(run(commit, args.out, SETTINGS + args.p), kept)
        sides.append(digests(kept))
    old, new = sides
    names = sorted(old.keys() | new.keys())
    with open(args.out / "golden.csv", "w", newline="") as handle:
        rows = [(name, old.get(name, ""), new.get(name, "")) for name in names]
        csv.writer(handle).writerows([("path", "old", "new"), *rows])
    different = [name for name in names if old.get(name) != new.get(name)]
    print(f"{len(names) - len(different)} of {len(names)} files equal byte for byte")
    for name in different:
        print(f"  {name}: " + ("only in the old" if name not in new else "only in the new" if name not in old else
                               "differs"))
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
