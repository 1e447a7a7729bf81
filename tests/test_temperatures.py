"""Temperatures, the primary endpoint and the frontier: against brute force, other packages and simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

from grpo_engage.evaluation.conclusions import DESCRIBED, lead_sentence
from grpo_engage.evaluation.pass_rule import gap_to_bound
from grpo_engage.evaluation.temperatures import (
    baseline_temperatures,
    choose_temperatures,
    lead_at_equal_diversity,
    primary_table,
)
from grpo_engage.stats.crossed import crossed_difference
from grpo_engage.stats.differences import difference_of
from grpo_engage.text.metrics import pass_at_k

GUARDS = {f"guard_{name}": False for name in ("empty", "echo", "spam", "toxic")}


def replies(levels, n_seeds=1, n_posts=30, n=16, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for system, level in levels.items():
        ease = rng.normal(0, 0.1, n_posts)
        for s in range(n_seeds):
            scores = np.clip(level + ease[:, None] + rng.normal(0, 0.15, (n_posts, n)), 0, 1)
            rows += [(system, s, f"p{post:02d}", sample, scores[post, sample])
                     for post in range(n_posts) for sample in range(n)]
    return pd.DataFrame(rows, columns=["arm", "seed", "post", "sample", "judge"]).assign(**GUARDS)


def by_brute_force(table, system, tau, k=10):
    own = table[table["arm"] == system]
    counts = (own["judge"] >= tau).groupby([own["seed"], own["post"]]).agg(["sum", "size"])
    return pass_at_k(counts["size"], counts["sum"], k).mean()


LEVELS = {"baseline_T0.5": 0.5, "baseline": 0.45, "baseline_T2": 0.3, "grpo_T0.5": 0.42, "grpo": 0.55, "grpo_T2": 0.2}


def test_marks_and_choices_are_those_of_a_loop():
    made = replies(LEVELS, n_seeds=2)
    marks = baseline_temperatures(made, [0.5, 1.0, 2.0], 1.0, 0.6)
    names = ["baseline_T0.5", "baseline", "baseline_T2"]
    for name, row in zip(names, marks.itertuples(), strict=True):
        assert by_brute_force(made, name, row.tau) == pytest.approx(row._3, abs=1e-9)
    assert marks.loc[marks["chosen"], "tau"].item() == marks["tau"].max()
    tau = marks["tau"].max()
    chosen = choose_temperatures(made, ["baseline", "grpo"], [0.5, 1.0, 2.0], 1.0, tau, 0.5)
    for row in chosen.itertuples():
        assert by_brute_force(made, row.system, tau) == pytest.approx(row._5, abs=1e-9)
    assert chosen[chosen["chosen"]]["system"].tolist() == ["baseline_T0.5", "grpo"]


def values(levels, n_seeds, seed=0, n_posts=40):
    rng = np.random.default_rng(seed)
    return pd.DataFrame([(system, s, f"p{post}", "pass@10", value) for system, level in levels.items()
                         for s in range(n_seeds) for post, value in enumerate(level + rng.normal(0, 0.2, n_posts))],
                        columns=["arm", "seed", "post", "metric", "value"])


def chosen_of(arms):
    return pd.DataFrame({"arm": arms, "temperature": 0.7, "system": arms, "chosen": True})


def test_the_primary_endpoint_is_paired_and_holm_goes_over_its_family_alone():
    arms = ["baseline", "a", "b", "c"]
    table = values({"baseline": 0.5, "a": 0.6, "b": 0.55, "c": 0.5}, n_seeds=1)
    found = primary_table(table, chosen_of(arms), arms[1:]).set_index("arm")
    wide = table.pivot(index="post", columns="arm", values="value")
    for arm in arms[1:]:
        other = ttest_rel(wide[arm], wide["baseline"])
        assert found.loc[arm, "p_value"] == pytest.approx(other.pvalue)
        assert (found.loc[arm, "low"], found.loc[arm, "high"]) == pytest.approx(tuple(other.confidence_interval()))
    np.testing.assert_allclose(found["p_holm"], multipletests(found["p_value"], method="holm")[1])
    assert (found["over"] == "posts, of one trained seed").all()
    some = primary_table(table, chosen_of(arms), arms[1:], family=["a", "c"]).set_index("arm")
    kept = found.loc[["a", "c"], "p_value"]
    np.testing.assert_allclose(some.loc[["a", "c"], "p_holm"], multipletests(kept, method="holm")[1])
    assert np.isnan(some.loc["b", "p_holm"]) and some.loc["b", "conclusion"] == DESCRIBED
    assert some.loc["b", "low"] == found.loc["b", "low"] and "over 2 arms" in lead_sentence(some.reset_index())


def test_with_seeds_both_are_crossed():
    table = values({"baseline": 0.5, "a": 0.6}, n_seeds=4)
    found = primary_table(table, chosen_of(["baseline", "a"]), ["a"]).iloc[0]
    a, b = (table[table["arm"] == arm].pivot(index="seed", columns="post", values="value").to_numpy()
            for arm in ("a", "baseline"))
    other = crossed_difference(a, b)
    assert (found["low"], found["high"], found["p_value"]) == pytest.approx((other.low, other.high, other.p_value))
    assert found["over"] == "posts and seeds" and found["n_seeds"] == 4


def test_equal_diversity_covers_the_true_lead_and_not_that_of_temperature():
    """Two arms on one line, at other places: no lead at equal diversity. Then one lies above."""
    for shift, misses in ((0.0, []), (0.1, [])):
        for trial in range(40):
            rng, rows = np.random.default_rng(trial), []
            for arm, places, lift in (("baseline", (0.2, 0.5, 0.8), 0.0), ("grpo", (0.3, 0.6), shift)):
                for place in places:
                    for post in range(16):
                        noise = rng.normal(0, 0.05, 2)
                        rows += [(f"{arm}_{place}", 0, f"p{post}", metric, value) for metric, value in (
                            ("self_bleu", 1 - place + noise[0]), ("pass@10", 0.9 - 0.5 * place + lift + noise[1]))]
            table = pd.DataFrame(rows, columns=["arm", "seed", "post", "metric", "value"])
            found = lead_at_equal_diversity(table, ["grpo_0.3", "grpo_0.6"],
                                            ["baseline_0.2", "baseline_0.5", "baseline_0.8"])
            misses.append(not found["low"] <= shift <= found["high"])
        assert np.mean(misses) <= 0.15  # 5% wanted; forty trials


def test_a_gap_is_what_unequal_posts_cost():
    rng = np.random.default_rng(1)
    for spread, wanted in ((0.001, 0.0), (0.3, 0.15)):
        rates = np.clip(rng.normal(0.15, spread, 20_000), 0, 1)
        exact = (1 - (1 - rates.mean()) ** 10) - np.mean(1 - (1 - rates) ** 10)
        counts = rng.binomial(64, rates)
        assert gap_to_bound(counts, 64)[1] == pytest.approx(exact, abs=0.01) and exact >= wanted


def test_nothing_shared_is_nan():
    one, other = pd.DataFrame([[0.1, 0.2]], columns=["a", "b"]), pd.DataFrame([[0.3]], columns=["c"])
    assert np.isnan(difference_of(one, other)[:4]).all() and difference_of(one, other).over == "nothing"
