"""The answers of the over-training study, from its units alone (no model): tables and a picture, in seconds.

    python benchmarks/over_training_answers.py UNITS OUT [--arms grpo hybrid ...]

UNITS is a folder of <arm>-seed<seed>.csv (benchmarks/over_training.py); OUT gets answers.csv, means.csv and a picture.
"""

import argparse
from pathlib import Path

from grpo_engage.base.core import write_csv
from grpo_engage.base.plots import savefig
from grpo_engage.studies.over_training import PRIMARY
from grpo_engage.studies.over_training_answers import answers, plot_over_training, read_units

JUDGES = ("twin", "sibling", "ngrams", "sentences", "judge_without_length", "states")  # the least independent first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("units", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", default=[name for name in PRIMARY if name != "baseline"])
    given = parser.parse_args()
    units = read_units(given.units, given.arms)
    judges = [name for name in JUDGES if name in units]
    table = answers(units, judges)
    write_csv(given.out / "answers.csv", table.round(4))
    looks = units.groupby(["arm", "split", "step", "temperature"], sort=False)
    means = looks[[name for name in units.columns[6:]]].mean().assign(n_seeds=looks["seed"].nunique())
    write_csv(given.out / "means.csv", means.reset_index().round(4))
    savefig(plot_over_training(units, judges), given.out / "over_training")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
