"""The curve over the pass mark against enumeration; the pictures show the numbers that they were given."""

import ast
import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.base.plots import arm_style
from grpo_engage.evaluation.pass_curves import plot_pass_curves
from grpo_engage.evaluation.pictures import plot_calibration, plot_forest, plot_tau_sensitivity, tau_sensitivity
from grpo_engage.evaluation.scoring import BLOCKING_GUARDS


def scores():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame([{"arm": arm, "seed": seed, "post": post, "judge": rng.random()}
                          for arm in ("baseline", "grpo") for seed in (0, 1) for post in range(3) for _ in range(5)])
    return frame.assign(**{f"guard_{name}": rng.random(len(frame)) < 0.1 for name in BLOCKING_GUARDS})


def test_tau_sensitivity_by_enumeration():
    scored = scores()
    guarded = scored[[f"guard_{name}" for name in BLOCKING_GUARDS]].any(axis=1)
    curve = tau_sensitivity(scored, k=2, marks=[0.3, 0.7]).set_index(["arm", "tau"])["value"]
    for arm, mark in curve.index:
        shares = []
        for _, group in scored.assign(good=(scored["judge"] >= mark) & ~guarded).query("arm == @arm").groupby(
                ["seed", "post"]):
            shares.append(np.mean([any(pair) for pair in itertools.combinations(group["good"], 2)]))
        assert curve[arm, mark] == pytest.approx(np.mean(shares))
    with pytest.raises(ValueError, match="draw more samples"):
        tau_sensitivity(scored, k=6)


def test_pictures_hold_the_numbers():
    curve = tau_sensitivity(scores(), k=2)
    lines = {line.get_label(): line for line in plot_tau_sensitivity(curve, 0.5, 2).axes[0].lines}
    assert np.allclose(lines["grpo"].get_ydata(), curve[curve["arm"] == "grpo"]["value"])
    table = pd.DataFrame({"arm": ["grpo", "hybrid"], "metric": "pass@1", "difference": [0.1, 0.2],
                          "low": [0.05, np.nan], "high": [0.2, np.nan]})
    axes = plot_forest(table, ["pass@1"]).axes[0]
    assert "hollow" in axes.get_xlabel() and "hollow" not in plot_forest(table.head(1), ["pass@1"]).axes[0].get_xlabel()
    single = plot_forest(table.assign(over="posts, of one trained seed"), ["pass@1"])
    assert "over posts, of one trained seed" in single.axes[0].get_xlabel()
    lines = axes.lines
    drawn = [tuple(line.get_xdata()) for line in lines]
    assert (0.05, 0.2) in drawn and (0.2,) in [tuple(x) for x in drawn]
    assert lines[drawn.index((0.2,))].get_markerfacecolor() == "none"  # no interval: hollow


def test_what_rests_on_part_of_the_posts_has_n_beside_it():
    table = pd.DataFrame([("grpo", "pass@1", 0.1, 0.05, 0.2, 64), ("hybrid", "pass@1", 0.2, np.nan, np.nan, 1),
                          ("grpo", "rouge_l", -0.1, -0.2, 0.0, 31), ("hybrid", "rouge_l", np.nan, np.nan, np.nan, 0)],
                         columns=["arm", "metric", "difference", "low", "high", "n_posts"])
    axes = plot_forest(table, ["pass@1", "rouge_l"]).axes[0]
    # at the right end of the interval; at the point where there is none; at 0 where there is no difference either
    assert [(note.get_text(), note.xy[0]) for note in axes.texts] == [("n = 1", 0.2), ("n = 31", 0.0), ("n = 0", 0.0)]
    heights = {line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and line.get_xdata()[1] == 0.0}
    assert axes.texts[1].xy[1] in heights and "64 posts, or n" in axes.get_xlabel()
    whole = plot_forest(table.assign(n_posts=64), ["pass@1", "rouge_l"]).axes[0]
    assert not whole.texts and not plot_forest(table.drop(columns="n_posts"), ["pass@1"]).axes[0].texts


ARMS = ["base", "baseline", "baseline_T0.7", "best_of_n", "grpo", "real", "their system"]


def test_an_arm_has_one_look_in_every_picture():
    curves = pd.concat([pd.DataFrame({"arm": arm, "k": range(1, 6), "value": 0.3, "ci_low": 0.2, "ci_high": 0.4})
                        for arm in ARMS])
    marks = pd.DataFrame([(arm, tau, 0.5) for arm in ARMS for tau in (0.2, 0.8)], columns=["arm", "tau", "value"])
    differences = pd.DataFrame([(arm, "pass@1", 0.1, 0.0, 0.2) for arm in ARMS],
                               columns=["arm", "metric", "difference", "low", "high"])
    rng = np.random.default_rng(0)
    replies = pd.concat([pd.DataFrame(rng.random((20, 3)), columns=["judge", "reward", "second_judge"]).assign(arm=arm)
                         for arm in ARMS])
    drawn = {"pass": plot_pass_curves(curves, 0.5), "tau": plot_tau_sensitivity(marks, 0.5),
             "forest": plot_forest(differences, ["pass@1"]), "calibration": plot_calibration(replies)}
    for name, figure in drawn.items():
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        for arm in set(ARMS) & set(lines):
            look = arm_style(arm)
            assert lines[arm].get_color() == look["color"], (name, arm)
            assert name == "tau" or lines[arm].get_marker() == look["marker"], (name, arm)
            assert name == "forest" or lines[arm].get_linestyle() == look["linestyle"], (name, arm)
        assert len(set(ARMS) & set(lines)) == len(ARMS) - (name == "calibration"), name  # there, no temperature


def test_no_module_has_colours_of_its_own():
    """Hues mean arms, so they are written down once; the paper's frame of warning is no figure."""
    found = set()
    for path in (REPO_ROOT / "grpo_engage").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if len(text) == 7 and text[0] == "#" and set(text[1:].lower()) <= set("0123456789abcdef"):
                found.add(path.relative_to(REPO_ROOT / "grpo_engage").as_posix())
    assert found == {"base/plots.py"}


def test_the_paper_draws_its_figures_without_torch():
    code = "import sys, grpo_engage.paper.paper; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT)
