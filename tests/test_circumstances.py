"""Circumstances compared within posts: against statsmodels, a known law, and a reply that went viral."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.discrete.conditional_models import ConditionalPoisson

from grpo_engage.data.simulator import LIKES, World, simulate_pairs
from grpo_engage.rewards.circumstances import covariates, deconfound
from grpo_engage.rewards.conditional_poisson import conditional_poisson
from grpo_engage.rewards.text_columns import text_columns


@pytest.fixture(scope="module")
def simulated() -> pd.DataFrame:
    return simulate_pairs(1500, 0, World(confounding=0, early=0))


@pytest.fixture(scope="module")
def text(simulated) -> pd.DataFrame:
    return text_columns(simulated)  # the texts are the same in every world: told once for all of them


def carried(pairs: pd.DataFrame, values: np.ndarray) -> float:
    apart = pd.DataFrame({"value": values, "followers": covariates(pairs)["log_followers"]})
    return (apart - apart.groupby(pairs["conversation_id"]).transform("mean")).corr().iloc[0, 1]


def test_shares_agree_with_statsmodels_where_nothing_is_weighted(simulated):
    some = simulated.head(900)
    columns = covariates(some, ["followers", "delay"])
    likes, posts = some.reply_likes.to_numpy(dtype=float), some.conversation_id.to_numpy()
    ours = conditional_poisson(likes, columns, posts, np.ones(len(some)))
    theirs = ConditionalPoisson(likes, columns, groups=posts).fit()
    np.testing.assert_allclose(ours["estimate"], theirs.params, atol=1e-3)


def test_the_law_comes_back_without_confounding(simulated, text):
    _, report = deconfound(simulated, np.ones(len(simulated), dtype=bool), text=text)
    for name, truth in (("log_followers", LIKES["followers"]), ("log_delay", LIKES["delay"])):
        assert report["intervals"][name]["ci_low"] < truth < report["intervals"][name]["ci_high"]


@pytest.mark.parametrize("world", [
    World(), World(confounding=0.6), World(confounding=0.6, gold="b"), World(hidden=0.6)])
def test_the_label_carries_no_followers_within_posts(world, text):
    pairs = simulate_pairs(1500, 0, world)
    labels, _ = deconfound(pairs, np.ones(len(pairs), dtype=bool), text=text)
    assert abs(carried(pairs, labels["residual"])) < 0.1


def test_one_viral_reply_moves_the_others_little(simulated, text):
    rows = np.ones(len(simulated), dtype=bool)
    before, _ = deconfound(simulated, rows, text=text)
    viral = simulated.copy()
    row = viral["reply_author_followers"].idxmin()
    viral.loc[row, "reply_likes"] = 100_000
    after, _ = deconfound(viral, rows, text=text)
    others = (simulated["conversation_id"] != simulated.loc[row, "conversation_id"]).to_numpy()
    ratio = (after["expected"] / before["expected"])[others]
    print(f"others' expected likes change by a factor of {ratio.min():.2f} to {ratio.max():.2f}")
    assert 0.75 < ratio.min() and ratio.max() < 1.33


def test_an_unknown_covariate_is_named_and_meta_plays_no_role(simulated):
    simulated = simulated.head(900)  # few posts have few text columns, and these are quick
    rows = np.ones(len(simulated), dtype=bool)
    with pytest.raises(ValueError, match="'follower' is unknown"):
        deconfound(simulated, rows, names=["follower"])
    scored = simulated.assign(meta=[f'{{"score": {likes}}}' for likes in simulated["reply_likes"]])
    pd.testing.assert_frame_equal(deconfound(scored, rows)[0], deconfound(simulated, rows)[0])


def test_text_columns_take_a_part_of_the_confounding(simulated, text):
    """True coefficient .25: without text the bias of the omitted variable is all there, with it under two thirds."""
    pairs = simulate_pairs(1500, 0, World(confounding=0.3))
    rows = np.ones(len(pairs), dtype=bool)
    bare, told = (deconfound(pairs, rows, text=columns)[1]["coefficients"]["log_followers"]
                  for columns in (text[[]], text))
    print(f"log followers: {bare:.3f} without text, {told:.3f} with {text.shape[1]} columns")
    assert 0 < LIKES["followers"] - told < 2 / 3 * (LIKES["followers"] - bare)


def test_text_columns_are_those_of_the_rows_alone(simulated):
    """No like, no follower and no other row enters."""
    some = simulated.head(2500)
    changed = some.assign(reply_likes=0, reply_author_followers=1, reply_time_diff_seconds=5)
    pd.testing.assert_frame_equal(text_columns(some), text_columns(changed))
