"""The curve over the pass mark against enumeration; the pictures show the numbers that they were given."""

import itertools

import numpy as np
import pandas as pd
import pytest

from grpo_engage.evaluation.pictures import plot_forest, plot_tau_sensitivity, tau_sensitivity
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
    lines = axes.lines
    drawn = [tuple(line.get_xdata()) for line in lines]
    assert (0.05, 0.2) in drawn and (0.2,) in [tuple(x) for x in drawn]
    assert lines[drawn.index((0.2,))].get_markerfacecolor() == "none"  # no interval: hollow
