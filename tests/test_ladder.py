"""The ladder of judges, against regressions and rank correlations worked out one by one on data copied out by rows."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import SplineTransformer

from grpo_engage.evaluation import ladder, robustness

ARMS = ["baseline", "grpo", "hybrid", "baseline_T0.7", "grpo_T0.7", "hybrid_T0.7", "grpo@40", "grpo@80", "base", "real"]


def made_up(seed: int = 0, n_posts: int = 12, n_seeds: int = 2) -> pd.DataFrame:
    """Replies of ARMS to the same posts, of unequal number; base and real stand under the first seed."""
    rng = np.random.default_rng(seed)
    seeds_of = {arm: 1 if arm in ("base", "real") else n_seeds for arm in ARMS}
    rows = [(arm, training, post, sample) for arm in ARMS for training in range(seeds_of[arm])
            for post in range(n_posts) for sample in range(rng.integers(3, 7))]
    table = pd.DataFrame(rows, columns=["arm", "seed", "post", "sample"])
    table["gold"] = table["arm"].map({arm: rng.normal() for arm in ARMS}) + rng.normal(size=n_posts)[table["post"]]
    table["gold"] += rng.normal(size=len(table))
    table["n_words"] = rng.integers(1, 28, len(table))
    table["reward"] = np.tanh(table["gold"]) + 0.1 * table["n_words"] + rng.normal(size=len(table))
    table["judge"] = table["gold"] ** 2 + 0.1 * table["n_words"] + rng.normal(size=len(table))
    return table.assign(kind="trained", tokens=np.where(table["arm"] == "real", np.nan, 9.0))


def copied_out(table: pd.DataFrame, seeds: np.ndarray, posts: np.ndarray) -> pd.DataFrame:
    """`table` with the posts and seeds drawn as often as the weights say, each copy under a name of its own."""
    parts = []
    for training, times in enumerate(seeds.astype(int)):
        for post, often in enumerate(posts.astype(int)):
            cell = table[(table["seed"] == training) & (table["post"] == post)]
            parts += [cell.assign(seed=f"{training}-{i}", post=f"{post}-{j}")
                      for i in range(times) for j in range(often)]
    return pd.concat(parts, ignore_index=True)


def everywhere(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the replies of what has one seed written out under every seed."""
    lone = table[table["arm"].isin(["base", "real"])]
    return pd.concat([table, *(lone.assign(seed=seed) for seed in sorted(table["seed"].unique())[1:])])


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_each_resample_is_the_correlation_of_what_was_drawn(n_seeds):
    table = made_up(n_seeds=n_seeds)
    seeds, posts = ladder.resampled(n_seeds, 6, 1), ladder.resampled(12, 6, 2)
    cells = ladder.system_cells(table, {"judge": "judge", "gold": "gold"})
    means = ladder.system_means(cells.values, seeds, posts)
    groups = [ladder.temperature_of(arm, arm != "real") for arm in cells.systems]
    found, within = ladder.rank_correlation(*means), ladder.within_groups(*means, groups)
    for draw in range(7):
        drawn = copied_out(everywhere(table), seeds[draw], posts[draw])
        by_cell = drawn.groupby(["arm", "seed", "post"])[["judge", "gold"]].mean()
        wanted = by_cell.groupby("arm").mean()
        assert means[:, draw].T == pytest.approx(wanted.loc[cells.systems].to_numpy())
        assert found[draw] == pytest.approx(spearmanr(wanted["judge"], wanted["gold"]).statistic)
        own = wanted.loc[["baseline", "grpo", "hybrid", "grpo@40", "grpo@80", "base"]]
        cool = wanted.loc[["baseline_T0.7", "grpo_T0.7", "hybrid_T0.7"]]
        rank = [spearmanr(part["judge"], part["gold"]).statistic for part in (own, cool)]
        assert within[draw] == pytest.approx((5 * rank[0] + 2 * rank[1]) / 7)


@pytest.mark.parametrize("given_name", ["gold", "n_words"])
def test_shared_errors_are_the_correlation_of_residuals_of_an_explicit_regression(given_name):
    table = made_up(3)
    given = table[given_name].to_numpy(dtype=float)
    spline = SplineTransformer(n_knots=6, degree=3, knots="quantile").fit(given[:, None])  # the curve is fitted once
    seeds, posts = ladder.resampled(2, 4, 5), ladder.resampled(12, 4, 6)
    weights = (seeds[:, :, None] * posts[:, None, :]).reshape(5, -1)
    cell = (table["seed"] * 12 + table["post"]).to_numpy()
    found = ladder.common_errors(table[["judge", "reward"]].to_numpy(), given, cell, weights)
    for draw in range(5):
        drawn = copied_out(table, seeds[draw], posts[draw])
        design = np.hstack([spline.transform(drawn[[given_name]].to_numpy(dtype=float)),
                            pd.get_dummies(drawn["seed"] + "/" + drawn["post"]).to_numpy(dtype=float)])
        left = [drawn[name] - LinearRegression().fit(design, drawn[name]).predict(design)
                for name in ("judge", "reward")]
        assert found[draw] == pytest.approx([pearsonr(*left).statistic, 1], abs=1e-6)


def test_planted_judges_are_seen_for_what_they_are():
    """The reward itself, the truth itself, and a judge with errors of its own, under many systems."""
    rng = np.random.default_rng(0)
    table = made_up(7, n_posts=40).drop(columns="judge")
    table = table.assign(own=table["gold"] + rng.normal(size=len(table)), truth=table["gold"], twin=table["reward"])
    rungs = {"gold": "gold", "copy of the truth": "truth", "twin": "twin", "own errors": "own",
             "training reward": "reward"}
    found = ladder.climb(table, rungs, n_boot=200).rungs.set_index("rung")
    assert found.loc["twin", ["with_reward", "shared_errors", "shared_errors_rank", "shared_errors_low"]].tolist() == (
        pytest.approx([1] * 4))
    assert found.loc["copy of the truth", ["with_gold", "with_gold_low", "with_gold_within"]].tolist() == [1, 1, 1]
    assert math.isnan(found.loc["copy of the truth", "shared_errors"])  # it has no errors
    low, high = found.loc["own errors", ["shared_errors_low", "shared_errors_high"]]
    assert low < 0 < high and high - low < 0.2
    assert (found["given"] == "gold and post").all() and (found["n_systems"] == len(ARMS)).all()


def test_where_the_truth_is_not_known_judges_are_held_against_each_other():
    table = made_up(2).assign(gold=np.nan)
    found = ladder.climb(table, {"judge": "judge", "heuristic": "judge", "training reward": "reward"}, n_boot=100)
    assert found.rungs["with_gold"].isna().all() and (found.rungs["given"] == "length and post").all()
    matrix = found.agreement.set_index(["rung", "other"])["value"]
    assert matrix["judge", "heuristic"] == 1 and len(matrix) == 6
    assert set(found.systems["system"]) == set(ARMS) and "gold" not in set(found.systems["rung"])


def test_a_judge_that_goes_on_rising_where_the_truth_falls_is_seen():
    table = made_up(4, n_posts=60)
    level = {"grpo@40": 1.0, "grpo@80": 3.0, "grpo": 0.0}
    own = table["arm"].map(level)
    noise = np.random.default_rng(1).normal(size=len(table))
    table["gold"] = own.fillna(1.0) + noise
    table["fooled"] = table["arm"].map({"grpo@40": 1.0, "grpo@80": 2.0, "grpo": 4.0}).fillna(0) + noise
    rungs = {"gold": "gold", "fooled": "fooled", "training reward": "reward"}
    found = ladder.climb(table, rungs, n_boot=200).rungs.set_index("rung")
    assert found.loc["gold", "over_training_high"] < 0 < found.loc["fooled", "over_training_low"]
    wanted = table.groupby(["arm", "seed", "post"])["gold"].mean().groupby("arm").mean()
    assert found.loc["gold", "over_training"] == pytest.approx(wanted["grpo"] - wanted["grpo@80"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=9))
def test_rank_correlation_equals_scipy(pairs):
    a, b = np.array(pairs, dtype=float).T
    found = ladder.rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic)


def test_one_post_or_nothing_known_gives_no_interval():
    assert math.isnan(ladder.with_interval(np.array([0.3, 0.2, 0.4]), 1)[1])
    value, low, high = ladder.with_interval(np.array([math.nan] * 4), 9)
    assert math.isnan(value) and math.isnan(low) and math.isnan(high)


def test_a_criterion_names_the_judges_that_do_not_share_it():
    table = pd.DataFrame([("grpo", "pass@10", "n-grams", False), ("grpo", "pass@10", "second judge", True),
                          ("grpo", "judge_engagement", "n-grams", True), ("best_of_n", "pass@10", "n-grams", False)],
                         columns=["arm", "metric", "view", "agrees"])
    decision = pd.DataFrame({"arm": "grpo", "criterion": ["pass@10 > 0.65", "judge_engagement > 0.65", "training"]})
    assert robustness.mark_unshared(decision, table)["unshared"].tolist() == ["n-grams", "", ""]
    assert robustness.disagreements(table, {"grpo"}) == {("grpo", "pass@10"): ["n-grams"]}


def test_a_system_that_replied_to_part_of_the_posts_has_n_beside_each_of_its_points():
    table = made_up()
    table = table[(table["arm"] != "real") | (table["post"] < 5)]
    systems = ladder.climb(table, {"gold": "gold", "judge": "judge", ladder.REWARD: "reward"}, n_boot=20).systems
    figure = ladder.plot_ladder(systems)
    real = systems[systems["system"] == "real"].set_index("rung")["mean"]
    assert [axes.get_title() for axes in figure.axes] == ["judge", "length", ladder.REWARD]
    for axes in figure.axes:
        assert [(note.get_text(), note.xy) for note in axes.texts] == [
            ("n = 5", (pytest.approx(real["gold"]), pytest.approx(real[axes.get_title()])))]
    assert "12 posts" in figure.get_supxlabel()
