"""The gate: what a score adds to length and TF-IDF, three verdicts, and how often it is wrong."""

import json
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.stats import norm, rankdata

from grpo_engage.base.core import child_seed
from grpo_engage.rewards.gate import VERDICTS, gate, pair_gains, read_verdicts, tuned_tfidf
from grpo_engage.rewards.heuristic import clear_pairs, pairwise_accuracy

OPENINGS = ("So sorry for them 😢", "What's the source?", "RT @bbc: confirmed", "本当ですか？", "لا أصدق", "Nope.", "")
ENDINGS = ("#Sydney", "https://t.co/x1", "— police say 3 are safe!", "🙏🙏", "…")


def world(random, n_posts=150, n_replies=6, effect=0.5):
    """Replies to posts, what TF-IDF knows of them, and something else; both raise likes by `effect` a deviation."""
    n = n_posts * n_replies
    table = pd.DataFrame({"conversation_id": np.repeat([f"c{i}" for i in range(n_posts)], n_replies),
                          "reply": [" ".join([random.choice(OPENINGS), *random.choice(ENDINGS, random.integers(1, 9))])
                                    for _ in range(n)]})
    words, more = random.normal(size=(2, n))
    table["reply_likes"] = random.poisson(np.exp(1 + 0.5 * words + effect * more) * random.gamma(2, 0.5, n))
    return table, words, more


@pytest.fixture(scope="module")
def big():
    return world(np.random.default_rng(0), n_posts=2500)


def verdict_rate(make, draws, n_posts=100):
    """How often each verdict is given to make(random, words, more) over worlds drawn anew."""
    found = []
    for seed in range(draws):
        random = np.random.default_rng(seed)
        table, words, more = world(random, n_posts)
        found.append(gate(table, make(random, words, more), words)["verdict"])
    return {name: found.count(name) / draws for name in VERDICTS}


def test_a_copy_and_noise_are_never_validated():
    """60 draws of each; both add nothing, and the smallest gain worth having lies above nothing."""
    copy = verdict_rate(lambda random, words, more: words + random.normal(0, 0.5, len(words)), 60)
    noise = verdict_rate(lambda random, words, more: random.normal(size=len(words)), 60)
    assert copy["validated"] <= 0.01 and noise["validated"] <= 0.01
    assert noise["refused"] < 0.2  # 100 conversations do not suffice to say so


def test_signal_is_validated_and_its_copy_refused(big):
    table, words, more = big
    random = np.random.default_rng(1)
    copy = words + random.normal(0, 0.5, len(words))
    pairs = clear_pairs(table.conversation_id, table.reply_likes)
    assert pairwise_accuracy(copy, *pairs).mean() > 0.6  # an order that looks as good as any
    assert gate(table, copy, words)["verdict"] == "refused"
    assert gate(table, words + 0.5 * more, words)["verdict"] == "validated"
    assert gate(table, random.normal(size=len(words)), words)["verdict"] == "refused"


def test_on_the_line_the_level_is_kept():
    """A score whose expected gain is just what is worth having: each certain verdict comes in about 2.5% of draws."""
    found = []
    for seed in range(60):
        random = np.random.default_rng(100 + seed)
        table, words, more = world(random, n_posts=150)
        found.append(gate(table, 0.25 * more + random.normal(size=len(words)), words))
    worth = np.mean([each["gain"] for each in found])
    assert worth > 0.003
    assert sum(each["ci_low"] > worth for each in found) <= 5
    assert sum(each["ci_high"] < worth for each in found) <= 5  # by the bootstrap alone: 10


def test_thirty_one_pairs_of_six_conversations_are_too_little(big):
    table, words, more = big
    found = gate(table.head(36), more[:36], words[:36])
    assert found["verdict"] == "too little to tell" and found["n_conversations"] <= 6
    assert np.isnan(found["gain"]) and "30 conversations and 100 clear pairs are needed" in found["text"]
    # enough conversations, too few pairs
    few = pd.DataFrame({"conversation_id": np.repeat(np.arange(40), 2), "reply": "ok", "reply_likes": [0, 9] * 40})
    found = gate(few, np.arange(80.0), np.zeros(80))
    assert (found["verdict"], found["n_clear_pairs"]) == ("too little to tell", 40)


def test_one_giant_conversation_decides_nothing():
    """A score that is right in one post of 300 replies, and noise in 60 others."""
    random = np.random.default_rng(3)
    table, words, more = world(random, n_posts=60)
    giant, its_words, its_more = world(random, n_posts=1, n_replies=300, effect=1.5)
    score = np.concatenate([random.normal(size=len(table)), its_more])
    both = pd.concat([table, giant.assign(conversation_id="giant")], ignore_index=True)
    words = np.concatenate([words, its_words])
    pairs = clear_pairs(both.conversation_id, both.reply_likes)
    assert pairwise_accuracy(score, *pairs).mean() > 0.7  # over pairs it looks excellent
    assert not gate(both, score, words)["validated"]


def test_only_the_order_counts_and_its_direction(big):
    table, words, more = big
    score = more + np.random.default_rng(2).normal(size=len(more))
    plain = gate(table, score, words)
    assert gate(table, np.exp(3 * score) - 7, 1e6 * words + 3) == plain
    upside_down = gate(table, -score, words)
    assert upside_down["verdict"] == "refused" and upside_down["gain"] == 0
    shuffled = np.random.default_rng(0).permutation(len(table))  # the rows' order decides nothing of importance
    moved = gate(table.iloc[shuffled].reset_index(drop=True), score[shuffled], words[shuffled])
    assert moved["gain"] == pytest.approx(plain["gain"], rel=1e-6)


def brute_force(base, score, pairs, posts, fold):
    """The nested models by a general optimiser, pair by pair."""
    table, gains = np.column_stack([base, score]), []

    def fit(columns, bounds):
        def loss(beta):
            total = 0.5 * beta @ beta / 200  # each pair once, not both ways round: half of C = 100's weight
            for higher, lower, post in train:
                margin = (table[higher, :columns] - table[lower, :columns]) @ beta
                total += np.log1p(np.exp(-margin)) / sum(other == post for _, _, other in train)
            return total
        return minimize(loss, np.zeros(columns), bounds=bounds, method="L-BFGS-B",
                        options={"ftol": 1e-15, "gtol": 1e-9}).x

    for number in range(max(fold.values()) + 1):
        train = [(h, lo, posts[h]) for h, lo in zip(*pairs, strict=True) if fold[posts[h]] != number]
        small = fit(base.shape[1], [(None, None)] * base.shape[1])
        full = fit(base.shape[1] + 1, [*[(None, None)] * base.shape[1], (0, None)])
        gains += [(h, lo, -np.log1p(np.exp(-(table[h] - table[lo]) @ full))
                   + np.log1p(np.exp(-(table[h, :-1] - table[lo, :-1]) @ small)))
                  for h, lo in zip(*pairs, strict=True) if fold[posts[h]] == number]
    return {(h, lo): value for h, lo, value in gains}


@pytest.mark.parametrize("sign", [1, -1])
def test_gains_equal_a_brute_force_computation(sign):
    random = np.random.default_rng(4)
    table, words, more = world(random, n_posts=12, n_replies=4)
    posts = table.conversation_id.to_numpy()
    base = np.column_stack([words, table.reply.str.len()]) / [1, 30]
    pairs = np.array([(i, j) for i, j in permutations(range(len(table)), 2) if posts[i] == posts[j]
                      and table.reply_likes[i] > 2 * table.reply_likes[j]]).T
    ours = pair_gains(base, sign * more, (pairs[0], pairs[1]), posts, seed=9)
    names = sorted(set(posts[pairs[0]]))
    drawn = np.random.default_rng(child_seed(9, "gate folds")).permutation(np.arange(len(names)) % 10)
    theirs = brute_force(base, sign * more, pairs, posts, dict(zip(names, drawn, strict=True)))
    np.testing.assert_allclose(ours, [theirs[pair] for pair in zip(*pairs, strict=True)], atol=1e-4)


def test_interval_and_gain_are_means_over_posts(big):
    table, words, more = big
    found = gate(table, more, words, seed=3)
    posts, pairs = table.conversation_id.to_numpy(), clear_pairs(table.conversation_id, table.reply_likes)

    def scaled(values):
        return norm.ppf((rankdata(values) - 0.5) / len(values))

    length = scaled(table.reply.str.len())
    gains = pair_gains(np.column_stack([length, length**2, scaled(words)]), scaled(more), pairs, posts, seed=3)
    by_post = np.array([gains[posts[pairs[0]] == post].mean() for post in dict.fromkeys(posts[pairs[0]])])
    assert found["gain"] == pytest.approx(by_post.mean(), abs=1e-12)
    half = 1.96 * by_post.std(ddof=1) / np.sqrt(len(by_post))
    assert found["gain"] - found["ci_low"] == pytest.approx(half, rel=0.1)
    assert found["ci_high"] - found["gain"] == pytest.approx(half, rel=0.25)
    assert found["n_conversations"] == len(by_post) and found["n_clear_pairs"] == len(gains)


def test_the_rival_is_tuned():
    """Where words decide it finds them; where nothing does it takes the strongest penalty, and says next to nothing."""
    random = np.random.default_rng(7)
    table, _, _ = world(random, n_posts=200)
    decided = table.assign(reply_likes=np.where(table.reply.str.contains("source"), 9, 1))
    other, _, _ = world(random, n_posts=50)
    told = other.assign(reply_likes=np.where(other.reply.str.contains("source"), 9, 1))
    pairs = clear_pairs(told.conversation_id, told.reply_likes)
    assert pairwise_accuracy(tuned_tfidf(decided, other.reply), *pairs).mean() > 0.95
    chance = table.assign(reply_likes=random.poisson(4, len(table)))
    assert np.ptp(tuned_tfidf(chance, other.reply)) < 0.2 * np.ptp(tuned_tfidf(decided, other.reply))


def test_bad_scores_and_old_files_are_refused(big, tmp_path):
    table, words, more = big
    with pytest.raises(ValueError, match="1 of 15000 scores are NaN"):
        gate(table, np.where(np.arange(len(more)) == 5, np.nan, more), words)
    (tmp_path / "reward_model").mkdir()
    (tmp_path / "reward_model" / "validation.json").write_text(json.dumps({"verdict": {"validated": True}}))
    with pytest.raises(ValueError, match="validation.json: holds no verdicts.*run the stage reward_model again"):
        read_verdicts(tmp_path)
