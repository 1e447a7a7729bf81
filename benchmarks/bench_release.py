"""Make a release of engage-bench (docs/bench.md).

    python benchmarks/bench_release.py OUT                     what the simulator gives: replies, worlds
    python benchmarks/bench_release.py OUT --run RUN           and a run's systems and candidates
    python benchmarks/bench_release.py OUT --run RUN --study STUDY --world WORLD
                                                               and the arms of the study of over-training in its world

The first needs a seed and the committed code alone and takes seconds. RUN is a folder outputs/runs/<run> of preset
`systems`, sampled; STUDY the output folder of benchmarks/over_training.py, WORLD the run that it was given. Hashes of
what was read are recorded in sources.json. The same inputs give the same bytes (with the versions of the lock file).
SHA256SUMS is written last; DATASHEET.md and LICENSE in OUT are covered by it, and not made here.
"""

import argparse
from pathlib import Path

import pandas as pd

from grpo_engage.base.core import file_sha256, read_json, write_json, write_parquet
from grpo_engage.bench.objective_track import KEYS, VALUES
from grpo_engage.bench.policy_samples import (
    OVERTRAINED,
    overtrained_samples,
    run_samples,
    run_scorers,
    whole_seeds,
    with_scores,
)
from grpo_engage.bench.release import coded, write_sums
from grpo_engage.bench.simulated import CONVERSATIONS, SEED, simulated_parts

SEEDS, BASELINE_SEEDS = (0,), (0, 1)  # of the study: whose replies v1 has, and whose baselines


def write_simulated(out: Path) -> None:
    for name, part in simulated_parts().items():
        write_parquet(out / f"{name}.parquet", part)
    write_json(out / "sources.json", {"simulated": {"seed": SEED, "conversations": CONVERSATIONS}})


def hashes(folder: Path, *names: str) -> dict[str, str]:
    """Name -> hash of the files and folders `names` of `folder`, those that are there."""
    return {name: file_sha256(folder / name) for name in names if (folder / name).exists()}


def study_parts(study: Path, world: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Replies of over-trained arms, the baselines' table, and what was read."""
    if lacking := set(SEEDS) - set(whole_seeds(study)):
        raise SystemExit(f"{study}: not every arm was sampled with seed {min(lacking)}")
    units = [study / "units" / f"baseline-seed{seed}.csv" for seed in BASELINE_SEEDS]
    baselines = pd.concat([pd.read_csv(path) for path in units], ignore_index=True)[[*KEYS, *VALUES]]
    read = {path.relative_to(study).as_posix(): file_sha256(path) for seed in SEEDS for arm in OVERTRAINED
            for path in sorted(study.glob(f"work/{arm}/seed{seed}/test-*.parquet"))}
    facts = {"seeds": SEEDS, "baselines": BASELINE_SEEDS, "marks": read_json(study / "pass.json")["rules"],
             "world": hashes(world, "data/pairs.parquet"),
             "inputs": read | hashes(study, "pass.json", *(path.relative_to(study).as_posix() for path in units))}
    return overtrained_samples(study, world, SEEDS), baselines, facts


def write_policies(out: Path, run: Path, study: Path | None, world: Path | None) -> None:
    scorers, sources = run_scorers(run), read_json(out / "sources.json")
    samples = {name: with_scores(sample, scorers) for name, sample in run_samples(run).items()}
    real = pd.read_parquet(out / "replies.parquet").query("part == 'test'")
    real = pd.DataFrame({"row": real.index.astype("int32"), "post": real["tweet"], "text": real["reply"]})
    write_parquet(out / "scores.parquet", with_scores(real, scorers)[["row", "reward", "judge"]])
    sources["run"] = {"preset": read_json(run / "config.json")["preset"], "inputs": hashes(
        run, "config.json", "data/pairs.parquet", "reward_model/reward", "reward_model/judge",
        "evaluation/generations.parquet", "evaluation/systems.parquet")}
    if study:
        samples["overtrained"], baselines, sources["study"] = study_parts(study, world)
        write_parquet(out / "objectives.parquet", baselines)
    samples, posts = coded(samples, "post")
    samples, texts = coded(samples, "text")
    for name, sample in samples.items():
        write_parquet(out / f"{name}.parquet", sample.astype({"seed": "int8", "sample": "int8"}))
    write_parquet(out / "posts.parquet", posts)
    write_parquet(out / "texts.parquet", texts)
    write_json(out / "sources.json", sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--world", type=Path)
    given = parser.parse_args()
    if bool(given.study) != bool(given.world) or (given.study and not given.run):
        parser.error("--study needs --world and --run")
    write_simulated(given.out)
    if given.run:
        write_policies(given.out, given.run, given.study, given.world)
    write_sums(given.out)


if __name__ == "__main__":
    main()
