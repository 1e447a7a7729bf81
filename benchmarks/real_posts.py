"""Four arms by SmolLM2 on posts that people wrote (notebook studies/06; questions in docs/log.md).

    python benchmarks/real_posts.py WORLD OUT [--seeds 0 1 2] [--arms grpo hybrid] [--jobs 2]

WORLD is a run up to reward_model, and policy, whose ladder has the judge `states`:

    python -m grpo_engage run reward_model --preset pheme-cpu --run world --data FILE -p max_conversations=100000 \
        -p 'fractions=[0.12,0.40,0.30,0.08,0.10]' -p 'ladder=["twin","states"]'
    python -m grpo_engage run policy --preset pheme-cpu --run world --data FILE

A unit is an arm with a seed: the baselines first, then seed after seed. When all baselines are there the pass mark is
frozen in OUT/pass.json, and each unit leaves OUT/units/<arm>-seed<seed>.csv, numbers alone; one whose file is there is
not done again. What a unit took (CPU minutes) is in OUT/cost.csv. Replies and adapters stay in OUT/work.
"""

import argparse
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed

from grpo_engage.base.core import say, write_csv
from grpo_engage.policy.base_models import quiet_libraries
from grpo_engage.studies.over_training import train_unit
from grpo_engage.studies.real_posts import (
    REAL_ARMS,
    REAL_STEPS,
    freeze_real_marks,
    read_real_world,
    sample_real,
    write_real,
)

WORLDS = {}


def ready(run: Path):
    """The world, read once in each process, which works with one thread."""
    torch.set_num_threads(1)
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    if run not in WORLDS:
        WORLDS[run] = read_real_world(run)
    return WORLDS[run]


def unit(run: Path, name: str, seed: int, out: Path) -> dict:
    begun, world = time.process_time(), ready(run)
    sample_real(name, seed, out, world)
    return {"arm": name, "seed": seed, "minutes": round((time.process_time() - begun) / 60, 2)}


def start(run: Path, seed: int, out: Path) -> None:
    train_unit("baseline", seed, out, ready(run), REAL_ARMS, REAL_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in (*REAL_ARMS, "best_of_4") if name != "baseline"]
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    baselines = [("baseline", seed) for seed in given.seeds]
    units = [(name, seed) for name, seed in [*baselines, *((name, seed) for seed in given.seeds for name in given.arms)]
             if not (given.out / "units" / f"{name}-seed{seed}.csv").exists()]
    waiting = []
    # first, so that no two units of a seed train the baseline that both start from
    Parallel(n_jobs=given.jobs)(delayed(start)(given.world, seed, given.out) for seed in sorted({s for _, s in units}))
    for spent in Parallel(n_jobs=given.jobs, return_as="generator_unordered")(
            delayed(unit)(given.world, name, seed, given.out) for name, seed in units):
        cost = given.out / "cost.csv"
        before = pd.read_csv(cost) if cost.exists() else pd.DataFrame()
        write_csv(cost, pd.concat([before, pd.DataFrame([spent])], ignore_index=True))
        say(f"{spent['arm']} seed {spent['seed']}: {spent['minutes']} CPU minutes")
        waiting.append((spent["arm"], spent["seed"]))
        if {*baselines} <= {*waiting} or (given.out / "pass.json").exists():
            freeze_real_marks(given.out, given.seeds)
            for name, seed in waiting:  # what is written is not written again
                write_real(name, seed, given.out, ready(given.world))


if __name__ == "__main__":
    main()
