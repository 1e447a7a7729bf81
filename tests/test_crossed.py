"""Posts and seeds as crossed factors: against analysis of variance, a mixed model, simulated coverage and power."""

import importlib.util
import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.stats.crossed import crossed_difference, crossed_power, crossed_variance, posts_and_seeds_needed

_spec = importlib.util.spec_from_file_location("coverage_proof", REPO_ROOT / "proofs" / "coverage.py")
proof = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(proof)


def crossed(seed, n_seeds=4, n_posts=30):
    rng = np.random.default_rng(seed)
    return (0.2 + rng.normal(0, 0.4, (n_seeds, 1)) + rng.normal(0, 1, (1, n_posts))
            + rng.normal(0, 0.7, (n_seeds, n_posts)))


def test_standard_error_is_that_of_the_crossed_mixed_model():
    """REML and the analysis of variance agree on a balanced table whose variance estimates are all positive."""
    data = crossed(0)
    long = pd.DataFrame({"y": data.ravel(), "seed": np.repeat(range(4), 30), "post": np.tile(range(30), 4), "all": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sm.MixedLM.from_formula("y ~ 1", groups="all", re_formula="0", data=long,
                                      vc_formula={"seed": "0 + C(seed)", "post": "0 + C(post)"}).fit(reml=True)
    result = crossed_difference(data, np.zeros(30))
    assert result.difference == pytest.approx(fit.params["Intercept"], abs=1e-6)
    assert result.standard_error == pytest.approx(fit.bse["Intercept"], rel=5e-3)


def test_conversations_by_a_loop_over_pairs_of_values():
    """The two-way cluster-robust definition: products of residuals that share a seed, a conversation, or both."""
    data, talk = crossed(1, 3, 8), np.array([0, 0, 1, 1, 1, 2, 3, 3])
    parts = crossed_variance(data, talk)
    by_seed, by_post = data.mean(1) - data.mean(), data.mean(0) - data.mean()
    rest = data - data.mean() - by_seed[:, None] - by_post
    posts = sum(by_post[i] * by_post[j] for i in range(8) for j in range(8) if talk[i] == talk[j]) / 64
    both = sum(rest[s, i] * rest[s, j]
               for s in range(3) for i in range(8) for j in range(8) if talk[i] == talk[j]) / 24**2
    assert parts.posts == pytest.approx(posts * 4 / 3)
    assert parts.both == pytest.approx(both * 3 / 2 * 4 / 3)
    assert parts.seeds == pytest.approx(stats.sem(data.mean(1)) ** 2)


def test_p_value_interval_direction_and_order():
    data = crossed(2)
    result = crossed_difference(data, np.zeros(30))
    edge = crossed_difference(data, np.full(30, result.low))
    assert edge.p_value == pytest.approx(0.05)
    swapped = crossed_difference(np.zeros(30), data)
    assert (swapped.difference, swapped.low) == pytest.approx((-result.difference, -result.high))
    assert swapped.ahead == pytest.approx(1 - result.ahead)
    order = np.random.default_rng(0).permutation(30)
    talk = np.arange(30) // 3
    assert crossed_difference(data[::-1][:, order], np.zeros(30), talk[order])[:6] == pytest.approx(
        crossed_difference(data, np.zeros(30), talk)[:6])


@pytest.mark.parametrize("n_seeds", [3, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 2.0])
def test_intervals_cover_and_the_usual_ones_do_not(n_seeds, ratio):
    """1,000 experiments each: the reduced form of `python proofs/coverage.py`."""
    rows = {row["method"]: row for row in proof.coverage_rows("even", n_seeds, ratio, 1000)}
    assert 0.93 <= rows["crossed (ours)"]["coverage"] <= 0.97
    assert abs(rows["crossed (ours)"]["false_alarms"] - 0.05) <= 0.02  # the committed table has 4,000 experiments
    assert rows["all values independent"]["coverage"] < 0.90
    if n_seeds == 3:
        assert rows["percentile bootstrap of seeds"]["coverage"] < 0.80


def test_committed_table_keeps_the_promise_it_states():
    table = pd.read_csv(REPO_ROOT / "proofs" / "coverage.csv")
    ours = table[(table["method"] == "crossed (ours)") & (table["seed_variance"] <= 2)]
    assert len(ours) == 5 * 2 * 4 and (ours["n_experiments"] >= 1000).all()
    kept = ours["coverage"].between(0.93, 0.97) & ((ours["false_alarms"] - 0.05).abs() <= 0.015)
    # The known exception: all variance in single cells, 3 seeds that do not differ. Too wide, never too narrow.
    outside = ours.loc[~kept, ["design", "n_seeds", "seed_variance"]].to_records(index=False).tolist()
    assert outside in ([], [("cells", 3, 0.0)]) and (ours["coverage"] < 0.98).all()
    naive = table[(table["method"] == "all values independent") & (table["seed_variance"] >= 0.5)]
    assert (naive["coverage"] < 0.93).all()


def test_power_equals_simulation_and_needs_grow_with_noise():
    rng = np.random.default_rng(0)
    data = (0.35 + rng.normal(0, 0.1, (4000, 5, 1)) + rng.normal(0, 0.8, (4000, 1, 40))
            + rng.normal(0, 0.6, (4000, 5, 40)))
    parts = crossed_variance(data)
    found = np.mean(np.abs(parts.mean) > stats.t.ppf(0.975, parts.df) * np.sqrt(parts.total))
    assert crossed_power(0.35, 0.01, 0.64, 0.36, 5, 40) == pytest.approx(found, abs=0.03)
    assert crossed_power(0.0, 0.01, 0.64, 0.36, 5, 40) == pytest.approx(0.05)
    table = posts_and_seeds_needed(crossed(3, 6, 50), 0.4, seeds=(3, 8, 40))
    assert np.isnan(table["n_posts"][0]) and table["power"][0] < 0.8  # no number of posts outweighs three seeds
    last = table.iloc[-1]
    parts = crossed_variance(crossed(3, 6, 50))
    variances = ((parts.seeds - parts.both) * 6, (parts.posts - parts.both) * 50, parts.both * 300)
    assert crossed_power(0.4, *variances, 40, int(last["n_posts"])) >= 0.8
    assert crossed_power(0.4, *variances, 40, int(last["n_posts"]) - 1) < 0.8


def test_too_little_is_nan_with_a_reason_and_nonsense_is_an_error():
    with pytest.warns(UserWarning, match="1 seed"):
        result = crossed_difference([[0.1, 0.2, 0.6]], np.zeros(3))
    assert result.difference == pytest.approx(0.3) and np.isnan(result[1:6]).all()
    with pytest.warns(UserWarning, match="1 conversation"):
        assert np.isnan(crossed_difference(np.ones((3, 2)), np.zeros(2), ["x", "x"]).low)
    assert crossed_difference(np.zeros((3, 4)), np.zeros(4)).p_value == 1.0
    for call, message in [(lambda: crossed_variance(np.zeros(3)), "seeds, posts"),
                          (lambda: crossed_variance(np.zeros((1, 3))), "two of each"),
                          (lambda: crossed_variance(np.zeros((2, 3)), ["a", None, "b"]), "1 missing"),
                          (lambda: crossed_variance([[1, np.nan], [1, 1]]), "1 NaN"),
                          (lambda: crossed_difference([[1, np.nan]], [1, 1]), "1 NaN of 2"),
                          (lambda: crossed_difference([[1, 2]], [1, 1], level=95), "level"),
                          (lambda: crossed_power(1, -1, 0, 1, 3, 3), "0 or more"),
                          (lambda: posts_and_seeds_needed(crossed(0), 0), "delta")]:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_interval_is_without_use():
    """A difference of mean squares that chance makes tiny once had degrees of freedom near 0, and an infinite t."""
    noise = np.random.default_rng(5).normal(size=(2000, 3, 30))
    parts = crossed_variance(noise)
    assert (parts.total >= parts.both).all() and (parts.df >= 2).all()
    half = stats.t.ppf(0.975, parts.df) * np.sqrt(parts.total)
    assert half.max() < 1.5 and np.mean(np.abs(parts.mean) <= half) >= 0.94
