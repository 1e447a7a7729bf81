"""The README's and the log's figures and tables from the committed results alone: no model, no GPU, seconds.

    python benchmarks/figures.py [--out FOLDER]

Without --out the committed files are written anew (`make figures`), the same bytes as long as nothing changed.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from grpo_engage.base.core import REPO_ROOT, say
from grpo_engage.base.plots import savefig, style
from grpo_engage.evaluation.ladder import plot_ladder
from grpo_engage.evaluation.pass_curves import plot_temperatures
from grpo_engage.studies.over_training_answers import (
    plot_over_training,
    read_units,
    whole_seeds,
    write_answers,
)

PUBLISHED = REPO_ROOT / "outputs" / "published"


def picture(figure, target: Path) -> None:
    """`figure` as a PNG at `target`; the vector file that is made with it is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        savefig(figure, Path(folder) / target.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((Path(folder) / f"{target.stem}.png").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO_ROOT)
    out = parser.parse_args().out
    style()
    points = pd.read_csv(REPO_ROOT / "benchmarks" / "systems" / "frontier_points.csv")
    picture(plot_temperatures(points), out / "docs" / "figures" / "frontier.png")
    systems = pd.read_csv(REPO_ROOT / "benchmarks" / "judges" / "systems.csv")
    picture(plot_ladder(systems), out / "docs" / "figures" / "ladder.png")
    study = PUBLISHED / "over_training"
    if len(whole_seeds(study / "units")) >= 2:  # intervals cross posts and seeds
        units = read_units(study / "units")
        write_answers(units, out / "outputs" / "published" / "over_training")
        picture(plot_over_training(units), out / "docs" / "figures" / "over_training.png")
    say(f"figures and tables are in {out}")


if __name__ == "__main__":
    main()
