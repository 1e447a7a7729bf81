"""Intervals and tests, checked against scipy, closed forms, enumeration and simulated coverage."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from grpo_engage.stats.intervals import cluster_bootstrap, expanded_level, holm, paired_difference, seed_interval


def unequal_clusters(seed: int, n_clusters: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(n_clusters), rng.integers(1, 9, size=n_clusters))
    return rng.normal(size=n_clusters)[clusters] + rng.normal(size=len(clusters)), clusters


def test_singleton_clusters_equal_scipys_bootstrap():
    values = np.random.default_rng(1).exponential(size=40)
    ours = cluster_bootstrap(values, np.arange(40), n_boot=500, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=500, confidence_level=expanded_level(0.95, 40), method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert ours == pytest.approx((values.mean(), theirs.low, theirs.high))


def test_cluster_bootstrap_equals_plain_resampling_of_whole_clusters():
    values, clusters = unequal_clusters(0)
    estimate, low, high = cluster_bootstrap(values, clusters, n_boot=20_000, seed=1)
    rng, means = np.random.default_rng(2), []
    groups = [values[clusters == c] for c in range(12)]
    for _ in range(20_000):  # the definition, written out
        means.append(np.concatenate([groups[i] for i in rng.integers(12, size=12)]).mean())
    tail = (1 - expanded_level(0.95, 12)) / 2
    assert estimate == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(np.quantile(means, [tail, 1 - tail]), abs=0.03)


def test_any_statistic_and_the_mean_agree_and_order_and_labels_do_not_matter():
    values, clusters = unequal_clusters(4)
    fast = cluster_bootstrap(values, clusters, seed=0)
    slow = cluster_bootstrap(values, clusters, statistic=lambda v: np.mean(v), seed=0)
    assert slow == pytest.approx(fast)  # same draws of cluster numbers, two routes
    order = np.random.default_rng(0).permutation(len(values))
    names = np.array([f"conversation{c:03d}" for c in clusters])
    assert cluster_bootstrap(values[order], names[order], seed=0) == pytest.approx(fast)
    assert cluster_bootstrap(values, clusters, seed=1)[1] != fast[1]


@pytest.mark.parametrize("n_clusters", [6, 16])
def test_coverage_over_clusters(n_clusters):
    """The interval holds the truth in about 95% of experiments; the unclustered one does not."""
    hits = naive_hits = 0
    for seed in range(400):
        rng = np.random.default_rng([seed, n_clusters])
        clusters = np.repeat(np.arange(n_clusters), 10)
        values = rng.normal(size=n_clusters)[clusters] + rng.normal(size=len(clusters))
        _, low, high = cluster_bootstrap(values, clusters, n_boot=300, seed=seed)
        _, naive_low, naive_high = cluster_bootstrap(values, np.arange(len(values)), n_boot=300, seed=seed)
        hits += low <= 0 <= high
        naive_hits += naive_low <= 0 <= naive_high
    assert 0.92 <= hits / 400 <= 0.98
    assert naive_hits / 400 < 0.75


def test_one_cluster_is_nan_with_a_warning_never_a_zero_width_interval():
    with pytest.warns(UserWarning, match="one cluster"):
        estimate, low, high = cluster_bootstrap([0.25, 0.75], ["x", "x"])
    assert estimate == 0.5 and np.isnan([low, high]).all()
    with pytest.warns(UserWarning, match="one cluster"):
        result = paired_difference([1, 2], [0, 0], clusters=["x", "x"])
    assert np.isnan([result.low, result.high, result.p_value]).all()
    with pytest.warns(UserWarning, match="one seed"):
        assert np.isnan(seed_interval([0.4])[1:]).all()


def test_constant_values_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cluster_bootstrap([1.0] * 6, [1, 1, 2, 2, 3, 3]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "values, clusters, message",
    [
        ([1.0, np.nan, np.inf], [1, 2, 3], "2 NaN or infinite entries of 3"),
        ([], [], "empty"),
        ([1.0, 2.0], ["a"], "one cluster for each value"),
        ([1.0, 2.0], ["a", None], "1 missing label"),
    ],
)
def test_bad_input_is_an_error(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(values, clusters)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_bad_level(level):
    with pytest.raises(ValueError, match="level"):
        cluster_bootstrap([1.0, 2.0], [1, 2], level=level)
    with pytest.raises(ValueError, match="level"):
        seed_interval([1.0, 2.0], level=level)


def test_sign_flip_p_value_equals_enumeration_by_cluster():
    values, clusters = unequal_clusters(7, n_clusters=8)
    sums = np.bincount(clusters, values + 0.4)
    flipped = np.array([np.dot(signs, sums) for signs in itertools.product([1, -1], repeat=8)])
    expected = min(1.0, 2 * min((flipped >= sums.sum() - 1e-9).mean(), (flipped <= sums.sum() + 1e-9).mean()))
    result = paired_difference(values + 0.4, np.zeros_like(values), clusters)
    assert result.p_value == pytest.approx(expected)
    assert (result.n, result.n_clusters) == (len(values), 8)
    assert result.difference == pytest.approx((values + 0.4).mean())


def test_paired_interval_is_the_bootstrap_of_the_differences_and_antisymmetric():
    rng = np.random.default_rng(0)
    shared, clusters = rng.normal(size=60) * 5, np.repeat(np.arange(20), 3)
    a, b = shared + rng.normal(size=60), shared + rng.normal(size=60)
    forward, backward = paired_difference(a, b, clusters), paired_difference(b, a, clusters)
    assert forward[:3] == pytest.approx(cluster_bootstrap(a - b, clusters))
    assert forward.difference == pytest.approx(-backward.difference)
    assert forward.p_value == pytest.approx(backward.p_value, abs=0.03)
    assert forward.high - forward.low < (np.subtract(*cluster_bootstrap(a, clusters)[:0:-1])) / 2  # pairing pays


def test_null_effect_is_called_significant_about_one_time_in_twenty():
    p = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        clusters = np.repeat(np.arange(12), 5)
        d = rng.normal(size=12)[clusters] + rng.normal(size=60)
        p.append(paired_difference(d, np.zeros(60), clusters, n_boot=50, n_permutations=499, seed=seed).p_value)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.085
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_unequal_arms_are_an_error():
    with pytest.raises(ValueError, match="same posts"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="difference a - b holds 1 NaN"):
        paired_difference([1.0, np.nan], [1.0, 2.0])


def test_holm_equals_the_step_down_procedure_written_out():
    p = np.random.default_rng(0).uniform(size=9) ** 2
    order, running, expected = np.argsort(p), 0.0, np.empty(9)
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (9 - rank) * p[index]))
        expected[index] = running
    assert holm(p) == pytest.approx(expected)
    assert holm([0.01, np.nan, 0.5])[0] == pytest.approx(0.03)  # a missing test still counts in the family
    assert np.isnan(holm([np.nan])).all() and holm([]).size == 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([1.2])


def test_seed_interval_is_the_one_sample_t_interval():
    values = [0.61, 0.7, 0.52, 0.66]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert seed_interval(values, level=0.9) == pytest.approx((np.mean(values), expected.low, expected.high))
    with pytest.raises(ValueError, match="NaN"):
        seed_interval([0.1, np.nan])
