"""`kill -9` at random moments of each arm's training, the same command again, and the same bytes.

For each arm: an undisturbed run; then copies of what lay there before the arm, killed at moments drawn uniformly over
the time that its training took (0 to 1), and once over what its stage had to do after that (1 to 2); alternately the
command (as when a machine goes down; nothing of it may live on) and the notebook's kernel alone (as when memory runs
out). The same command is then given again. Compared with the undisturbed run, byte by byte: the adapter, its config,
train_log.csv (which must hold each step once) and, for the last kill of each arm, evaluation/metrics.csv (`--metrics
all`: after every kill).

    python proofs/survival.py      # everything through the command line -> proofs/survival.csv
    python proofs/survival.py --processes 2 --arms hybrid    # n_processes=2 -> proofs/survival_2_processes.csv

A moment is anchored to the last event before it (training begins, checkpoint n is there), so that a machine that is
slower just then meets it too. GRPO_ENGAGE_MODELS says where `nano` is cached.
"""

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from grpo_engage.base.core import read_json, say
from grpo_engage.train.objective import ARMS

# the baseline's steps take so little time that ten would be over before anybody could kill them
STEPS, SAVE_STEPS = {arm: 60 if arm == "baseline" else 10 for arm in ARMS}, {arm: 2 for arm in ARMS} | {"baseline": 10}
SETTINGS = ["n_conversations=120", *[f"train.{arm}.max_steps={n}" for arm, n in STEPS.items()],
            *[f"train.{arm}.save_steps={n}" for arm, n in SAVE_STEPS.items()], "n_test_posts=4", "n_validation_posts=4",
            "n_samples=16", "n_boot=200", "max_new_tokens=16", "posts_per_step=4",
            "num_generations=4", "allow_unvalidated_reward=true"]
ADAPTER = "adapter/adapter_model.safetensors"  # not the folder, which Snakemake makes before the job
COMPARED = (ADAPTER, "adapter/adapter_config.json", "train_log.csv")
COLUMNS = ["arm", "killed", "moment", "steps_at_kill", "resumed_from", "identical", "each_step_once",
           "metrics_identical", "seconds"]


def command(run: str, arm: str, stage: str) -> list[str]:
    arms = dict.fromkeys(["baseline", arm])  # its validation replies set the pass mark, and some arms start from it
    words = [sys.executable, "-m", "grpo_engage", "run", stage, "--preset", "smoke", "--run", run]
    return words + [word for text in [f"arms=[{', '.join(arms)}]", *SETTINGS] for word in ("-p", text)]


class Run:
    """One command at work, watched through the files of the arm's folder."""

    def __init__(self, runs: Path, name: str, arm: str, stage: str) -> None:
        self.folder = runs / name / "train" / arm / "seed0"
        self.log = runs / f"{name}.log"
        self.began = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command(name, arm, stage), stdout=log, stderr=log,
                                            env=os.environ | {"GRPO_ENGAGE_RUNS": str(runs)})

    def events(self) -> list[str]:
        """What has happened: "start", the checkpoints that are there, "adapter" (trained), "over" (the stage is)."""
        steps = sorted(int(path.name.split("-")[1]) for path in self.folder.glob("checkpoints/checkpoint-*")
                        if (path / "trainer_state.json").exists())
        started = (self.folder / "checkpoints" / "settings.json").exists()
        trained = (self.folder / ADAPTER).exists()
        return [*(["start"] if started else []), *map(str, steps), *(["adapter"] if trained else []),
                *(["over"] if trained and not (self.folder / "checkpoints").exists() else [])]

    def watch(self, wanted: str | None = None) -> dict[str, float]:
        """Wait for an event (None: the end); every event with its time in seconds."""
        seen: dict[str, float] = {}
        while wanted not in seen:
            alive = self.process.poll() is None
            for event in self.events():
                seen.setdefault(event, time.monotonic() - self.began)
            if not alive:
                break
            time.sleep(0.02)
        return seen

    def end(self) -> int:
        return self.process.wait()

    def kill(self, what: str) -> bool:
        """Whether there was still something to kill."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        if what == "command":
            self.process.send_signal(signal.SIGKILL)
        else:
            kernels = [child for child in tree if "ipykernel_launcher" in " ".join(child.cmdline())]
            if not kernels:
                return False
            kernels[0].send_signal(signal.SIGKILL)
        code = self.end()
        _, alive = psutil.wait_procs(tree, timeout=60)
        if code == 0 and read_json(self.folder / "manifest.json")["status"] == "completed":
            return False  # the notebook had ended, and its kernel was about to
        if alive or code == 0:
            raise RuntimeError(f"after the kill of the {what}: exit code {code}, still alive {alive}")
        return True


def copied(source: Path, target: Path, arm: str) -> None:
    """What lay there before `arm` was trained."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=lambda folder, names: {"evaluation"} if Path(folder) == source else set())
    shutil.rmtree(target / "train" / arm, ignore_errors=True)


def undisturbed(runs: Path, arm: str, source: Path | None) -> dict[str, float]:
    name = f"{arm}-whole"
    if source is not None:
        copied(source, runs / name, arm)
    run = Run(runs, name, arm, "evaluation")
    seen = run.watch()
    if run.end():
        raise RuntimeError(f"the undisturbed run failed: {run.log.read_text()[-2000:]}")
    return seen


def killed(runs: Path, arm: str, source: Path, seen: dict[str, float], what: str, moment: float, stage: str) -> dict:
    """One kill and the run that goes on from it."""
    name, folder = f"{arm}-killed", Path("train") / arm / "seed0"
    whole, again = runs / f"{arm}-whole", runs / name
    for _ in range(5):
        copied(source, again, arm)
        (runs / f"{name}.log").unlink(missing_ok=True)
        begin, end = ("start", "adapter") if moment < 1 else ("adapter", "over")
        at = seen[begin] + moment % 1 * (seen[end] - seen[begin])
        anchor = max((event for event in seen if seen[event] <= at), key=seen.get)
        run = Run(runs, name, arm, stage)
        run.watch(anchor)
        time.sleep(at - seen[anchor])
        if run.process.poll() is None and end not in run.events() and run.kill(what):
            break
        run.end()
        say(f"{arm}: it was over before the kill; once more, at half the time")
        moment -= moment % 1 / 2
    else:
        raise RuntimeError("it was always over before the kill")
    last = max([int(event) for event in run.events() if event.isdigit()], default=0)
    run.log.unlink()
    start = time.monotonic()
    if (run := Run(runs, name, arm, stage)).end():
        raise RuntimeError(f"the same command failed: {run.log.read_text()[-2000:]}")
    seconds = time.monotonic() - start
    resumed = re.findall(r"goes on after step (\d+)", run.log.read_text())

    def same(path: str) -> str:
        return "yes" if (whole / path).read_bytes() == (again / path).read_bytes() else "no"

    steps = pd.read_csv(again / folder / "train_log.csv")["step"].tolist()
    return {"arm": arm, "killed": what, "moment": f"{moment:.2f}",
            "steps_at_kill": f"{last}-{min(last + SAVE_STEPS[arm], STEPS[arm])}",
            "resumed_from": resumed[-1] if resumed else "0",
            "identical": "yes" if {same(str(folder / part)) for part in COMPARED} == {"yes"} else "no",
            "each_step_once": "yes" if steps == list(range(1, STEPS[arm] + 1)) else "no",
            "metrics_identical": same("evaluation/metrics.csv") if stage == "evaluation" else "not run",
            "seconds": f"{seconds:.0f}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: a temporary one, removed at the end)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--kills", type=int, default=3, help="random moments while each arm trains")
    parser.add_argument("--metrics", choices=("last", "all"), default="last")
    parser.add_argument("--processes", type=int, default=1, help="n_processes of the training stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    SETTINGS.extend([f"n_processes={args.processes}"] if args.processes > 1 else [])
    table = Path(__file__).with_name(f"survival_{args.processes}_processes.csv" if args.processes > 1
                                     else "survival.csv")
    runs = args.runs or Path(tempfile.mkdtemp(prefix="grpo_engage_survival_"))
    runs.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with open(table, "w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        handle.flush()
        base = None  # the run that every arm's copies begin with: the baseline's, which the other arms need or may have
        for place, arm in enumerate(dict.fromkeys(["baseline", *args.arms])):
            seen = undisturbed(runs, arm, base)
            say(f"{arm}: undisturbed, " + ", ".join(f"{event} after {at:.1f} s" for event, at in seen.items()))
            base = base or runs / f"{arm}-whole"
            if arm not in args.arms:
                continue
            moments = np.random.default_rng([args.seed, list(ARMS).index(arm)]).random(args.kills + 1)
            moments[-1] += 1
            for number, moment in enumerate(moments):
                what = ("command", "kernel")[(place + number) % 2]
                stage = "evaluation" if args.metrics == "all" or number == len(moments) - 1 else "train"
                row = killed(runs, arm, base, seen, what, float(moment), stage)
                wrong += "no" in row.values()
                writer.writerow(row)
                handle.flush()
                say(", ".join(f"{name} {value}" for name, value in row.items()))
    if not args.runs:
        shutil.rmtree(runs)
    print(f"{wrong} of the kills changed the result" if wrong else "every run ended with the undisturbed run's bytes")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
