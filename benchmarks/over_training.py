"""Arms trained far too long in a world with known truth (notebooks studies/02, 03; questions in docs/log.md).

    python benchmarks/over_training.py WORLD OUT [--seeds 0 1 ... 7] [--arms grpo hybrid] [--secondary] [--jobs 2]

WORLD is a run of preset `judges` up to reward_model, and policy:

    python -m grpo_engage run best_of_n --preset judges --run world

Units, an arm with a seed, are done in the order of the seeds, so that whole seeds come first; each leaves
OUT/units/<arm>-seed<seed>.csv, and one whose file is there is not done again. The pass mark is frozen in
OUT/pass.json when the baselines of all seeds have been sampled; what a unit took (CPU minutes) is in
OUT/cost.csv. Replies and adapters stay in OUT/work. Only OUT/parts.csv (what gold is made of) and OUT/marks.csv (the
leads at other pass marks) need them afterwards, on seeds of which the replies of all primary arms are there; to go on
with other arms without them, the baselines are trained again.
"""

import argparse
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed

from grpo_engage.base.core import say, write_csv
from grpo_engage.data.pairs import load_pairs
from grpo_engage.policy.base_models import quiet_libraries
from grpo_engage.studies.over_training import (
    PRIMARY,
    SAMPLED,
    SECONDARY,
    World,
    freeze_marks,
    sample_unit,
    train_unit,
    world_in,
    write_unit,
)
from grpo_engage.studies.over_training_answers import ARMS
from grpo_engage.studies.over_training_checks import parts_of_units
from grpo_engage.studies.over_training_marks import leads_at_marks, looks_at_marks, seeds_with_replies


def ready(run: Path) -> World:
    """The world, read once in each process, which works with one thread."""
    torch.set_num_threads(1)
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    return world_in(run)


def baseline(run: Path, seed: int, out: Path) -> None:
    sample_unit("baseline", seed, out, ready(run))


def start(run: Path, seed: int, out: Path) -> None:
    train_unit("baseline", seed, out, ready(run))


def unit(run: Path, name: str, seed: int, out: Path) -> dict:
    begun, world = time.process_time(), ready(run)
    write_unit(name, seed, out, world)
    return {"arm": name, "seed": seed, "minutes": round((time.process_time() - begun) / 60, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--arms", nargs="+", default=list(PRIMARY), choices=list(PRIMARY | SECONDARY | SAMPLED))
    parser.add_argument("--secondary", action="store_true", help="the secondary arms in place of --arms")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    arms = list(SECONDARY) if given.secondary else given.arms
    if not (given.out / "pass.json").exists():
        Parallel(n_jobs=given.jobs)(delayed(baseline)(given.world, seed, given.out) for seed in given.seeds)
    say(f"pass marks: {freeze_marks(given.out, given.seeds)['rules']}")
    units = [(name, seed) for seed in given.seeds for name in arms
             if not (given.out / "units" / f"{name}-seed{seed}.csv").exists()]
    # first, so that no two units of a seed train the baseline that both start from
    Parallel(n_jobs=given.jobs)(delayed(start)(given.world, seed, given.out) for seed in sorted({s for _, s in units}))
    done = Parallel(n_jobs=given.jobs, return_as="generator_unordered")(
        delayed(unit)(given.world, name, seed, given.out) for name, seed in units)
    for number, spent in enumerate(done, 1):
        path = given.out / "cost.csv"
        before = pd.read_csv(path) if path.exists() else pd.DataFrame()
        write_csv(path, pd.concat([before, pd.DataFrame([spent])], ignore_index=True))
        say(f"{spent['arm']} seed {spent['seed']}: {number} of {len(units)} units, {spent['minutes']} CPU minutes")
    posts = load_pairs(given.world).drop_duplicates("conversation_id").set_index("conversation_id")["tweet"]
    write_csv(given.out / "parts.csv", parts_of_units(given.out, posts).round(5))
    if seeds_with_replies(given.out, ["baseline", *ARMS]):
        write_csv(given.out / "marks.csv", leads_at_marks(looks_at_marks(given.out)).round(4))


if __name__ == "__main__":
    main()
