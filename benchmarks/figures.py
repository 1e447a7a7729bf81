"""The README's figures, the study's tables and the published paper from committed results alone: no model, no GPU.

    python benchmarks/figures.py [--out FOLDER]
    python benchmarks/figures.py --record NAME [--files PATH ...] [--command TEXT --commit HASH --notebook PATH]

Without --out the committed files are written anew (`make figures`), the same bytes as long as nothing changed: figures
in docs/figures/, tables in outputs/published/, the paper in paper/study/. The paper is refused where a result is not
the one that outputs/published/sources.json records; --record puts new ones there (without --files those that the entry
has), with the command and the commit that made them and the notebook that explains them.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from grpo_engage.base.core import REPO_ROOT, read_json, say, write_csv
from grpo_engage.base.plots import savefig, style
from grpo_engage.evaluation.ladder import plot_ladder
from grpo_engage.evaluation.pass_curves import plot_temperatures
from grpo_engage.paper.published_sources import LIST, record_source
from grpo_engage.paper.study import build_study
from grpo_engage.studies.over_training_answers import (
    plot_over_training,
    read_units,
    whole_seeds,
    write_answers,
)
from grpo_engage.studies.over_training_checks import write_checks
from grpo_engage.studies.plain_monitors import monitor_rows
from grpo_engage.studies.real_posts_answers import write_real_answers

PUBLISHED = REPO_ROOT / "outputs" / "published"


def picture(figure, target: Path) -> None:
    """`figure` as a PNG at `target`; the vector file that is made with it is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        savefig(figure, Path(folder) / target.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((Path(folder) / f"{target.stem}.png").read_bytes())


def plot_growth(growth: pd.DataFrame) -> Figure:
    """Seconds and memory of a GRPO step, TRL's beside ours, against what grows: speed.py's --growth, one policy."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes_names, measures = list(growth["axis"].unique()), {"seconds": "seconds a step", "peak_gb": "peak memory, GB"}
    ways = growth["way"].map({"stock grpo": "TRL", "grpo": "ours"})
    growth = growth.assign(peak_gb=growth["peak_mb"] / 1024, way=ways)
    grid = figure.subplots(2, len(axes_names), sharex="col", sharey="row")
    for row, (measure, label) in zip(grid, measures.items(), strict=True):
        for axes, name in zip(row, axes_names, strict=True):
            part = growth[growth["axis"] == name]
            sns.lineplot(part, x="value", y=measure, hue="way", style="way", markers=True, dashes=False, ax=axes,
                         legend=axes is grid[0, 0])
            if measure == "seconds":
                for _, way in part.groupby("way"):
                    axes.vlines(way["value"], way["seconds_q1"], way["seconds_q3"], color="0.5", linewidth=0.8)
            values = sorted(part["value"].unique())
            axes.set(xscale="log", ylabel=label, xlabel=name if measure == "peak_gb" else "", ylim=(0, None))
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
    grid[0, 0].legend(title="")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO_ROOT)
    parser.add_argument("--record", metavar="NAME")
    parser.add_argument("--files", nargs="+")
    for fact in ("command", "commit", "notebook"):
        parser.add_argument(f"--{fact}")
    given = parser.parse_args()
    out = given.out
    if given.record:
        facts = {fact: value for fact in ("command", "commit", "notebook") if (value := getattr(given, fact))}
        files = given.files or read_json(REPO_ROOT / LIST)[given.record]["files"]
        record_source(REPO_ROOT, given.record, list(files), **facts)
        return
    style()
    points = pd.read_csv(REPO_ROOT / "benchmarks" / "systems" / "frontier_points.csv")
    picture(plot_temperatures(points), out / "docs" / "figures" / "frontier.png")
    systems = pd.read_csv(REPO_ROOT / "benchmarks" / "judges" / "systems.csv")
    picture(plot_ladder(systems), out / "docs" / "figures" / "ladder.png")
    growth = pd.read_csv(REPO_ROOT / "benchmarks" / "growth.csv")
    picture(plot_growth(growth[growth["policy"] == "smollm2-135m"]), out / "docs" / "figures" / "growth.png")
    study = PUBLISHED / "over_training"
    if len(whole_seeds(study / "units")) >= 2:  # intervals cross posts and seeds
        units = read_units(study / "units")
        write_answers(units, out / "outputs" / "published" / "over_training")
        write_checks(study / "units", out / "outputs" / "published" / "over_training")
        write_csv(out / "outputs" / "published" / "over_training" / "monitors.csv", monitor_rows(units).round(4))
        picture(plot_over_training(units), out / "docs" / "figures" / "over_training.png")
        second, arms = PUBLISHED / "over_training_second", ("grpo", "hybrid")  # another formula is the truth
        found = read_units(second / "units", arms)
        write_answers(found, out / "outputs" / "published" / second.name, at_distance=False)
        write_csv(out / "outputs" / "published" / second.name / "monitors.csv", monitor_rows(found, arms).round(4))
        write_real_answers(PUBLISHED / "real_posts", out / "outputs" / "published" / "real_posts")
        build_study(REPO_ROOT, out / "paper" / "study", {"frontier": plot_temperatures(points),
                                                         "over_training": plot_over_training(units)})
    say(f"figures and tables are in {out}")


if __name__ == "__main__":
    main()
