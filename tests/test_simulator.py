"""The simulator: margins and confounds of the likes, separate streams, a gold appeal that cannot be gamed cheaply."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from grpo_engage.data import simulator
from grpo_engage.data.gold import COMPONENTS, gold_appeal, gold_components, strategy_fit, tokenize
from grpo_engage.data.grammar import KINDS, STRATEGIES, TONES, TOPICS, write_post, write_reply
from grpo_engage.data.simulator import draw_context, draw_likes, simulate_pairs, simulate_text

SPEC = importlib.util.spec_from_file_location(
    "simulator_difficulty", Path(__file__).parents[1] / "benchmarks" / "simulator_difficulty.py")
difficulty = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(difficulty)

# Aggregate numbers of PHEME-RNR, as benchmarks/simulator_difficulty.py measured them
PHEME = {"zero": 0.708, "p50": 0, "p90": 2, "p99": 8, "length": 0.576, "tfidf ridge": 0.600, "metadata ridge": 0.745,
         "metadata trees": 0.750}


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    """A third of PHEME's size, with meta unpacked and gold appeal beside it."""
    frame = difficulty.add_meta(simulate_pairs(2000, seed=11))
    return frame.assign(gold=gold_appeal(frame["tweet"], frame["reply"]))


def test_schema_and_nothing_null(pairs):
    expected = {"tweet", "reply", "reply_likes", "tweet_likes", "reply_retweets", "reply_author_followers",
                "reply_time_diff_seconds", "conversation_id", "reply_id", "source", "meta"}
    assert expected <= set(pairs.columns) and not pairs.isna().any().any()
    assert pairs["reply_id"].is_unique and pairs["conversation_id"].nunique() == 2000
    assert (pairs.groupby("conversation_id")["tweet"].nunique() == 1).all()
    counts = ["reply_likes", "tweet_likes", "reply_retweets", "reply_author_followers", "reply_time_diff_seconds"]
    assert (pairs[counts] >= 0).all().all() and (pairs[counts].dtypes == np.int64).all()
    assert pairs["reply"].str.strip().ne("").all()
    meta = json.loads(pairs["meta"][0])
    assert list(meta) == sorted(meta) and meta["strategy"] in STRATEGIES and isinstance(meta["broadcast"], bool)


def test_margins_match_pheme(pairs):
    likes = pairs["reply_likes"]
    assert abs((likes == 0).mean() - PHEME["zero"]) < 0.03
    assert likes.median() == PHEME["p50"]
    assert abs(likes.quantile(0.9) - PHEME["p90"]) <= 1 and abs(likes.quantile(0.99) - PHEME["p99"]) <= 1
    assert likes.var() > 3 * likes.mean()  # overdispersed
    assert abs(pairs.groupby("conversation_id").size().mean() - 7.16) < 0.5
    assert 0.03 < pairs["broadcast"].mean() < 0.07


def test_confounds_have_the_signs_of_pheme(pairs):
    real = {"reply_author_followers": 0.137, "reply_time_diff_seconds": -0.151, "tweet_likes": 0.145,
            "broadcast": 0.089}
    for name, value in real.items():
        measured = spearmanr(pairs[name], pairs["reply_likes"])[0]
        assert np.sign(measured) == np.sign(value) and abs(measured - value) < 0.06, name


def test_context_depends_on_the_text_so_it_confounds(pairs):
    delay = np.log(pairs["reply_time_diff_seconds"]).groupby(pairs["strategy"]).mean()
    followers = np.log1p(pairs["reply_author_followers"]).groupby(pairs["strategy"]).mean()
    assert delay["fact"] > delay["humour"] + 0.3 and followers["fact"] > followers["generic"] + 0.3


def test_as_hard_as_pheme(pairs):
    measured = difficulty.difficulty(pairs, seed=0, splits=2, gold=pairs["gold"].to_numpy())
    for name in ("length", "tfidf ridge", "metadata ridge", "metadata trees"):
        assert abs(measured[name] - PHEME[name]) < 0.05, (name, measured)  # the benchmark checks 0.04 at full size
    assert measured["tfidf ridge"] + 0.05 < measured["gold (oracle)"] < 0.76
    assert measured["spearman tfidf, gold"] < 0.7  # gold is more than a bag of the reply's words


def test_clear_pairs_against_brute_force():
    frame = pd.DataFrame({"conversation_id": list("aaabb"), "reply_likes": [0, 3, 7, 1, 2]})
    wanted = {(i, j) for i in range(5) for j in range(5) if frame.conversation_id[i] == frame.conversation_id[j]
              and frame.reply_likes[i] >= 2 * max(frame.reply_likes[j], 1) + 1}
    assert {tuple(pair) for pair in difficulty.clear_pairs(frame).tolist()} == wanted == {(1, 0), (2, 0), (2, 1)}
    score = np.array([0.0, 1, 1, 0, 0])
    assert difficulty.pair_accuracy(score, difficulty.clear_pairs(frame)) == pytest.approx(2.5 / 3)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first = simulate_pairs(40, seed=5)
    assert first.to_csv() == simulate_pairs(40, seed=5).to_csv()
    other = simulate_pairs(40, seed=6)
    assert set(first["reply_id"]).isdisjoint(other["reply_id"]) and set(first["tweet"]) != set(other["tweet"])


def test_likes_draw_from_their_own_stream(monkeypatch):
    before = simulate_pairs(60, seed=2)
    monkeypatch.setitem(simulator.LIKES, "gold", 2.0)
    monkeypatch.setitem(simulator.LIKES, "intercept", 1.0)
    after = simulate_pairs(60, seed=2)
    assert (before["reply_likes"] != after["reply_likes"]).any()
    unchanged = [c for c in before.columns if c not in ("reply_likes", "reply_retweets")]
    pd.testing.assert_frame_equal(before[unchanged], after[unchanged])


def test_likes_rise_with_gold_when_the_context_is_fixed():
    text = simulate_text(400, seed=3)
    context = draw_context(text, seed=3)
    low, high = (draw_likes(np.full(len(text), g), context, seed=3)[0].mean() for g in (0.0, 0.8))
    ratio = np.exp(simulator.LIKES["gold"] * 0.8 / simulator.GOLD_SD)  # the closed form of the expected ratio
    assert high / low == pytest.approx(ratio, rel=0.25)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_gold_is_bounded_pure_and_defined_on_any_text(post, reply):
    value = gold_appeal([post], [reply])
    assert value.shape == (1,) and 0 <= value[0] <= 1
    assert value == gold_appeal([post], [reply])
    parts = gold_components([post], [reply])
    assert tuple(parts.columns) == COMPONENTS and ((parts >= 0) & (parts <= 1)).all().all()


def test_gold_does_not_depend_on_the_batch(pairs):
    some = pairs.sample(50, random_state=0)
    alone = [gold_appeal([t], [r])[0] for t, r in zip(some["tweet"], some["reply"], strict=True)]
    np.testing.assert_array_equal(alone, some["gold"])


def test_gold_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 posts but 1 replies"):
        gold_appeal(["a", "b"], ["c"])


def exploits(post: str, rng: np.random.Generator) -> dict[str, str]:
    """Texts that a careless reward would like."""
    topic = next(t for t in TOPICS if any(e in post for e in t.entity + t.part + t.act))
    words = sorted({w for cores in STRATEGIES.values() for c in cores for w in c.split() if "{" not in w})
    stuffed = list(topic.entity + topic.part + topic.act) + ["maria", "elm street", "friday", "12"]
    cores = [write_reply(write_post(rng), name, rng) for name in ("fact", "humour", "agree")]
    return {
        "empty": "", "blank": "   ", "echo": post, "half echo": " ".join(post.split()[:9]), "emoji": "🔥" * 20,
        "spam": "follow me for free coins, link in bio!", "generic": "this is great, thanks for sharing!",
        "salad": " ".join(rng.choice(words, 12)), "stuffed": " ".join(rng.permutation(stuffed)[:10]),
        "stuffed with commas": ", ".join(rng.permutation(stuffed)[:8]), "repeated": f"the {topic.entity[0]} " * 8,
        "long": "a" * 10_000, "shuffled": " ".join(rng.permutation(" ".join(cores).split())[:14]),
        "letters": "".join(rng.choice(list("abcdefghij klmn"), 60)),
    }


def test_exploits_score_low(pairs):
    rng = np.random.default_rng(0)
    rows = [(post, name, text) for post in pairs["tweet"].drop_duplicates().head(150)
            for name, text in exploits(post, rng).items()]
    frame = pd.DataFrame(rows, columns=["tweet", "name", "reply"])
    frame["gold"] = gold_appeal(frame["tweet"], frame["reply"])
    worst = frame.groupby("name")["gold"].max()
    assert (worst < 0.2).all(), worst.sort_values()
    assert (frame.groupby("name")["gold"].mean() < 0.1).all()
    assert pairs["gold"].quantile(0.75) > 0.4  # honest replies do get there


def test_mixing_every_strategy_does_not_pay():
    post = "hot take: nobody needs the milk foam in mill lane any more. change my mind, tom."
    counter = "fair, but the milk foam has another side. ask grace from oak park."
    mixed = "fair, but the milk foam has another side. plot twist, well done, records say when i was ten."
    assert gold_appeal([post], [counter])[0] > 1.5 * gold_appeal([post], [mixed])[0]


def test_gold_follows_the_post_not_only_the_reply():
    """Each good strategy is the best one somewhere, by the table and by the texts themselves."""
    tables = pd.DataFrame({(k, t): strategy_fit(k, t) for k in KINDS for t in TONES})
    assert set(tables.idxmax()) >= {"fact", "counterpoint", "agree", "humour", "anecdote"}
    assert ((tables >= 0.8 * tables.max()).sum().between(1, 3)).all()  # only a few work on one post
    rng = np.random.default_rng(4)
    posts = [write_post(rng) for _ in range(200)]
    good = [s for s in STRATEGIES if s not in ("generic", "spam", "echo")]
    gold = np.array([[gold_appeal([p.text] * 12, [write_reply(p, s, rng) for _ in range(12)]).mean() for s in good]
                     for p in posts])
    share = np.bincount(gold.argmax(1), minlength=len(good)) / len(posts)
    assert share.max() < 0.4 and (share > 0.02).all(), dict(zip(good, share, strict=True))


def test_best_reply_varies_in_strategy(pairs):
    row = difficulty.gold_by_strategy(pairs, pairs["gold"].to_numpy())
    best = [v for k, v in row.items() if k.startswith("best reply")]
    assert max(best) < 0.4 and sum(v > 0.05 for v in best) == 6
    assert max(row[f"mean gold, {s}"] for s in ("echo", "spam", "generic")) < 0.1


def test_posts_hardly_repeat_and_replies_are_short(pairs):
    posts = pairs.drop_duplicates("conversation_id")["tweet"]
    assert posts.nunique() / len(posts) > 0.98
    assert pairs["reply"].str.split().str.len().quantile(0.95) <= 20
    vocabulary = {word for text in [*pairs["tweet"], *pairs["reply"]] for word in tokenize(text)}
    assert len(vocabulary) < 1000
    honest = pairs[~pairs["strategy"].isin(["generic", "spam", "echo"])]
    assert honest["reply"].nunique() / len(honest) > 0.9


def test_zero_conversations_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        simulate_pairs(0, seed=0)
