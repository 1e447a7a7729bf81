"""benchmarks/deconfounding.py: its likelihood against statsmodels, and a tiny run of the whole."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import spearmanr

from grpo_engage.data.simulator import GOLD_SCALES, LIKES, World, simulate_pairs
from grpo_engage.data.truth import gold_of

SPEC = importlib.util.spec_from_file_location(
    "deconfounding", Path(__file__).parents[1] / "benchmarks" / "deconfounding.py")
deconfounding = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(deconfounding)


def test_the_likelihood_is_that_of_a_conditional_poisson():
    pairs = simulate_pairs(1500, 3)
    totals, sizes = (pairs.groupby("conversation_id")["reply_likes"].transform(how) for how in ("sum", "size"))
    pairs = pairs[(totals == 3) & (sizes > 1)]  # equal totals, hence equal weights
    x = deconfounding.circumstances(pairs)
    post = pd.factorize(pairs["conversation_id"])[0]
    own = deconfounding.fit_within(pairs["reply_likes"].to_numpy(float), post, x, 3, np.zeros(len(pairs)))
    other = sm.ConditionalPoisson(pairs["reply_likes"].to_numpy(), x, groups=post).fit()
    np.testing.assert_allclose(own, other.params, atol=5e-3)


def test_rank_agreement_against_scipy_on_one_post():
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    assert np.isclose(deconfounding.within_spearman(first, second, np.zeros(30, int)), spearmanr(first, second)[0])


def test_a_tiny_run_has_every_world_and_naive_labels_fall_with_confounding(monkeypatch):
    monkeypatch.setattr(deconfounding, "DIALS", {"confounding": (0.0, 0.6)})
    table = deconfounding.turn_dials(200, 1)
    assert len(table) == 2 * 2 * 3 and table.notna().all().all()
    naive = table[table["way"] == "naive"].set_index(["gold", "value"])["labels"]
    within = table[table["way"] == "within"].set_index(["gold", "value"])
    for gold in "ab":
        assert naive[gold, 0.0] > naive[gold, 0.6] + 0.05
        assert within["labels"][gold, 0.6] > naive[gold, 0.6] + 0.03
    for name, true in (("followers", 0.25), ("delay", -0.43)):  # free of confounding, the text need not be known
        assert abs(within.loc[[("a", 0.0), ("b", 0.0)], name].mean() - true) < 0.15, name
    assert len(deconfounding.draw(table).axes) == 1
    assert World(**deconfounding.OFF) == World()


def test_true_coefficients_come_back_at_every_dial_where_the_text_is_known():
    """With gold itself as the text's score nothing is lost, so the text model loses what the table lacks."""
    for confounding in (0.0, 0.6):
        pairs = simulate_pairs(1200, 5, World(confounding=confounding, early=0.0))
        x = deconfounding.circumstances(pairs)[:, :2]
        gold = (gold_of(pairs)(pairs["tweet"], pairs["reply"]) - GOLD_SCALES["a"][0]) / GOLD_SCALES["a"][1]
        likes, post = pairs["reply_likes"].to_numpy(float), pd.factorize(pairs["conversation_id"])[0]
        found = deconfounding.fit_within(likes, post, np.column_stack([x, gold]), 3, np.zeros(len(pairs)))
        np.testing.assert_allclose(found, [LIKES[name] for name in ("followers", "delay", "gold")], atol=0.08)
