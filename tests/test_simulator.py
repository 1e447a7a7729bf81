"""The simulator: margins and confounds of the likes, separate streams, a gold appeal that cannot be gamed cheaply."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from grpo_engage.data import simulator
from grpo_engage.data.gold import COMPONENTS, gold_appeal, gold_components, strategy_fit, tokenize
from grpo_engage.data.grammar import KINDS, STRATEGIES, TONES, TOPICS, write_post, write_reply
from grpo_engage.data.settings import GOLD_NAMES, DataSettings
from grpo_engage.data.simulator import (
    World,
    draw_context,
    draw_likes,
    expected_log_likes,
    simulate_pairs,
    simulate_text,
    true_log_likes,
    world_of,
)
from grpo_engage.data.truth import GOLD_SOURCES, GOLDS, gold_appeal_b, gold_of

SPEC = importlib.util.spec_from_file_location(
    "simulator_difficulty", Path(__file__).parents[1] / "benchmarks" / "simulator_difficulty.py")
difficulty = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(difficulty)

# Aggregate numbers of PHEME-RNR, as benchmarks/simulator_difficulty.py measured them
PHEME = {"zero": 0.708, "p50": 0, "p90": 2, "p99": 8, "length": 0.576, "tfidf ridge": 0.600, "metadata ridge": 0.731,
         "metadata trees": 0.738, "within posts, log followers": 0.114, "within posts, log delay": -0.273}


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
    assert list(meta) == ["event", "kind", "strategy", "topic"] and meta["strategy"] in STRATEGIES


def test_margins_match_pheme(pairs):
    likes = pairs["reply_likes"]
    assert abs((likes == 0).mean() - PHEME["zero"]) < 0.03
    assert likes.median() == PHEME["p50"]
    assert abs(likes.quantile(0.9) - PHEME["p90"]) <= 1 and abs(likes.quantile(0.99) - PHEME["p99"]) <= 1
    assert likes.var() > 3 * likes.mean()  # overdispersed
    assert abs(pairs.groupby("conversation_id").size().mean() - 7.16) < 0.5


def test_confounds_have_the_signs_of_pheme(pairs):
    real = {"reply_author_followers": 0.137, "reply_time_diff_seconds": -0.151, "tweet_likes": 0.145}
    for name, value in real.items():
        measured = spearmanr(pairs[name], pairs["reply_likes"])[0]
        assert np.sign(measured) == np.sign(value) and abs(measured - value) < 0.06, name


def test_circumstances_within_posts_count_as_in_pheme(pairs):
    for name, value in difficulty.circumstances_within_posts(pairs).items():
        assert abs(value - PHEME[name]) < 0.05, name


def test_circumstances_within_posts_against_a_conditional_poisson_fit(pairs):
    """The benchmark's own likelihood, posts unweighted, is statsmodels' conditional Poisson."""
    some = pairs[pairs["conversation_id"].isin(pairs["conversation_id"].unique()[:300])].copy()
    some = some[some.groupby("conversation_id")["reply_likes"].transform("sum") == 3]  # equal totals: equal weights
    x = np.log1p(some[["reply_author_followers", "reply_time_diff_seconds"]].to_numpy(float))
    other = sm.ConditionalPoisson(some["reply_likes"].to_numpy(), x, groups=some["conversation_id"].to_numpy()).fit()
    np.testing.assert_allclose(list(difficulty.circumstances_within_posts(some).values()), other.params, atol=1e-3)


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
    context = draw_context(text, gold_appeal(text["tweet"], text["reply"]), seed=3)
    low, high = (draw_likes(np.full(len(text), g), context, seed=3)[0].mean() for g in (0.0, 0.8))
    ratio = np.exp(simulator.LIKES["gold"] * 0.8 / simulator.GOLD_SCALES["a"][1])  # closed form of the expected ratio
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
    for name, gold in GOLDS.items():
        frame["gold"] = gold(frame["tweet"], frame["reply"])
        worst = frame.groupby("name")["gold"].max()
        assert (worst < 0.2).all(), (name, worst.sort_values())
        assert (frame.groupby("name")["gold"].mean() < 0.1).all()
        assert np.quantile(gold(pairs["tweet"], pairs["reply"]), 0.75) > 0.4  # honest replies do get there


def test_mixing_every_strategy_does_not_pay():
    post = "hot take: nobody needs the milk foam in mill lane any more. change my mind, tom."
    counter = "fair, but the milk foam has another side. ask grace from oak park."
    mixed = "fair, but the milk foam has another side. plot twist, well done, records say when i was ten."
    assert gold_appeal([post], [counter])[0] > 1.5 * gold_appeal([post], [mixed])[0]


@pytest.mark.parametrize("name", GOLDS)
def test_gold_follows_the_post_not_only_the_reply(name):
    """Each good strategy is the best one somewhere, by the table and by the texts themselves."""
    tables = pd.DataFrame({(k, t): strategy_fit(k, t, name) for k in KINDS for t in TONES})
    assert set(tables.idxmax()) >= {"fact", "counterpoint", "agree", "humour", "anecdote"}
    assert ((tables >= 0.8 * tables.max()).sum().between(1, 3)).all()  # only a few work on one post
    rng = np.random.default_rng(4)
    posts = [write_post(rng) for _ in range(200)]
    good = [s for s in STRATEGIES if s not in ("generic", "spam", "echo")]
    gold = np.array([[GOLDS[name]([p.text] * 12, [write_reply(p, s, rng) for _ in range(12)]).mean() for s in good]
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


# --- version 2: frozen, dials, a second gold


def test_the_text_stream_is_that_of_the_first_simulator():
    """Hashes taken from the first version: the worlds differ in who writes and what it earns, never in the texts."""
    for n, seed, wanted in ((200, 5, "9055d63e0203e9a7"), (1000, 11, "ccaa21f0b6c989ff")):
        assert hashlib.sha256(simulate_text(n, seed).to_csv(index=False).encode()).hexdigest().startswith(wanted)


def test_version_2_is_frozen():
    """The constants, the default dials and what comes out. Arms have been compared on these: change none."""
    constants = json.dumps([simulator.LIKES, simulator.CONTEXT, simulator.GOLD_SCALES, simulator.HIDDEN_CORRELATION,
                            simulator.REPLIES_A_POST, vars(World())], sort_keys=True)
    assert hashlib.sha256(constants.encode()).hexdigest()[:16] == "75682464d06bcc2c"
    drawn = {gold: simulate_pairs(50, 3, World(gold=gold)) for gold in GOLDS}
    facts = {gold: (int(t.reply_likes.sum()), int(t.reply_author_followers.median()),
                    round(float(gold_of(t)(t.tweet, t.reply).sum()), 3)) for gold, t in drawn.items()}
    assert facts == {"a": (181, 248, 97.297), "b": (180, 251, 98.144)}


def _within(values, posts) -> np.ndarray:
    values = pd.Series(np.asarray(values, dtype=float), index=posts.index)
    return (values - values.groupby(posts).transform("mean")).to_numpy()


@pytest.mark.parametrize("gold", GOLDS)
@pytest.mark.parametrize("dial", [0.0, 0.3, 0.6])
def test_the_dial_is_the_measured_correlation_within_posts(dial, gold):
    pairs = simulate_pairs(500, 7, World(confounding=dial, gold=gold))
    posts = pairs["conversation_id"]
    truth = _within(gold_of(pairs)(pairs["tweet"], pairs["reply"]), posts)
    for column, sign in (("reply_author_followers", -1), ("reply_time_diff_seconds", 1)):
        measured = np.corrcoef(_within(np.log1p(pairs[column]), posts), truth)[0, 1]
        assert measured == pytest.approx(sign * dial, abs=0.06), column


def test_the_spread_of_circumstances_does_not_move_with_the_dials():
    spread = [np.log1p(simulate_pairs(300, 7, World(confounding=c))[["reply_author_followers",
              "reply_time_diff_seconds"]]).std().to_numpy() for c in (0, 0.3, 0.6)]
    np.testing.assert_allclose(spread, [spread[0]] * 3, rtol=0.06)


def test_raw_likes_say_less_about_gold_as_each_dial_turns():
    found = {}
    for name, dials in {"confounding": (0, 0.3, 0.6), "hidden": (0, 0.3, 0.6)}.items():
        for dial in dials:
            pairs = simulate_pairs(600, 9, World(**{"confounding": 0, "early": 0} | {name: dial}))
            gold = _within(gold_of(pairs)(pairs["tweet"], pairs["reply"]), pairs["conversation_id"])
            found[name, dial] = spearmanr(_within(pairs["reply_likes"], pairs["conversation_id"]), gold)[0]
    for name in ("confounding", "hidden"):
        assert found[name, 0] > found[name, 0.3] + 0.04 > found[name, 0.6] + 0.08, found


def test_who_comes_early_gets_more_because_of_the_place_alone():
    """Arrival moves likes beside lateness: among replies of equal lateness the earlier place gets more."""
    text = simulate_text(200, 1)
    flat, steep = (World(confounding=0, early=e) for e in (0.0, 0.5))
    context = draw_context(text, np.zeros(len(text)), 1)
    order = context["lateness"].groupby(text["conversation_id"]).rank()
    assert (context["arrival"] == order).all()
    zero = np.zeros(len(text))
    lost = expected_log_likes(zero, context, flat) - expected_log_likes(zero, context, steep)
    np.testing.assert_allclose(lost, 0.5 * np.log(order))


def test_the_hidden_confounder_is_in_no_column():
    """It moves likes by the dial, and neither a column nor the text of the data set tells it."""
    world = World(confounding=0.0, hidden=0.6)
    pairs, plain = simulate_pairs(400, 4, world), simulate_pairs(400, 4, World(confounding=0.0))
    same = [name for name in pairs if name not in ("reply_likes", "reply_retweets")]
    pd.testing.assert_frame_equal(pairs[same], plain[same])  # a column that told it would differ
    text = simulate_text(400, 4)
    gold = gold_appeal(text["tweet"], text["reply"])
    unseen = draw_context(text, gold, 4, world)["unseen"]
    assert np.corrcoef(_within(unseen, text["conversation_id"]), _within(gold, text["conversation_id"]))[0, 1] == (
        pytest.approx(simulator.HIDDEN_CORRELATION, abs=0.06))
    moved = true_log_likes(400, 4, world) - true_log_likes(400, 4, World(confounding=0.0))
    np.testing.assert_allclose(moved, 0.6 * unseen)


def test_the_second_gold_is_another_but_not_the_opposite(pairs):
    b = gold_appeal_b(pairs["tweet"], pairs["reply"])
    ranks = pd.DataFrame({"a": pairs["gold"], "b": b}).groupby(pairs["conversation_id"].to_numpy()).rank()
    within = np.corrcoef(*(_within(ranks[name], pairs["conversation_id"]) for name in "ab"))[0, 1]
    assert 0.4 < within < 0.8 and 0.4 < spearmanr(pairs["gold"], b)[0] < 0.8
    frame = pairs.assign(b=b)[pairs.groupby("conversation_id")["gold"].transform("size") >= 5]
    first, second = (frame.groupby("conversation_id")[name].idxmax().to_numpy() for name in ("gold", "b"))
    assert np.mean(first != second) > 0.4  # another reply wins
    best = difficulty.gold_by_strategy(pairs, b)
    shares = [value for name, value in best.items() if name.startswith("best reply")]
    assert max(shares) < 0.4 and sum(share > 0.05 for share in shares) == 6
    words = pairs["reply"].str.split().str.len()
    assert spearmanr(words, b)[0] < spearmanr(words, pairs["gold"])[0] - 0.1  # it does not share the taste for length


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_the_second_gold_is_bounded_pure_and_defined_on_any_text(post, reply):
    value = gold_appeal_b([post], [reply])
    assert value.shape == (1,) and 0 <= value[0] <= 1 and value == gold_appeal_b([post], [reply])


def test_gold_of_knows_every_world_and_nothing_else(pairs):
    for name, gold in GOLDS.items():
        drawn = simulate_pairs(5, 1, World(gold=name))
        assert gold_of(drawn) is gold and set(drawn["source"]) == {GOLD_SOURCES[name]}
    both = pd.concat([simulate_pairs(5, 1), simulate_pairs(5, 1, World(gold="b"))])
    with pytest.raises(ValueError, match="simulator, simulator_b"):
        gold_of(both)
    real = pd.DataFrame({"source": ["PHEME-RNR 🐦", "ツイッター", None]})
    assert gold_of(real) is None and gold_of(pd.concat([pairs, real])) is None


def test_settings_of_the_stage_name_the_same_world():
    assert world_of(DataSettings().flat()) == World() and tuple(GOLDS) == GOLD_NAMES
    turned = DataSettings(confounding=0.6, hidden_confounder=0.3, early_advantage=0.0, gold="b")
    assert world_of(turned.recorded()) == World(0.6, 0.3, 0.0, "b")
