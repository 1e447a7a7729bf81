"""Entries of engage-bench that span the range, in the form that a stranger's have (docs/bench.md).

Tracks reward and judge: random, length, naive, ngrams, embeddings, judge_of_the_run, reward_of_the_run, gold.
Track deconfounding: learn_random, learn_length, learn_naive, learn_between, learn_within.

    python -m grpo_engage bench --track reward benchmarks/engage_bench/baselines.py:ngrams
    python benchmarks/engage_bench/baselines.py [NAME ...]           all of them, or these, on every track they are for
"""

import hashlib
import sys
from functools import cache

import numpy as np
import pandas as pd
import statsmodels.api as sm
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from grpo_engage.bench.judge_track import judge_samples
from grpo_engage.bench.release import read_part
from grpo_engage.bench.reward_track import policy_sample
from grpo_engage.bench.simulated import rows_to_learn
from grpo_engage.data.gold import gold_appeal
from grpo_engage.rewards.conditional_poisson import conditional_poisson
from grpo_engage.text.embedding import embed
from grpo_engage.text.metrics import words

SCORES = ("random", "length", "naive", "ngrams", "embeddings", "judge_of_the_run", "reward_of_the_run", "gold")
LEARNERS = ("learn_random", "learn_length", "learn_naive", "learn_between", "learn_within")


def random(completions, post):
    """A hash of post and reply: what chance gives."""
    return [int.from_bytes(hashlib.sha256(f"{one}\0{reply}".encode()).digest()[:4], "big") / 2**32
            for one, reply in zip(post, completions, strict=True)]


def length(completions):
    return [len(words(reply)) for reply in completions]


def gold(completions, post):
    """The truth itself: what no learner can pass."""
    return gold_appeal(post, completions)


# Learned from the rows of the default world, once in a process.
@cache
def train():
    return rows_to_learn({name: read_part(name) for name in ("replies", "worlds")}, "a default")


def tfidf():
    return TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)


@cache
def naive_model():
    """Log of likes on the reply's n-grams, all rows together: popular posts and early replies count as merit."""
    rows = train()
    return make_pipeline(tfidf(), Ridge(alpha=3.0)).fit(rows["reply"], np.log1p(rows["reply_likes"]))


def naive(completions):
    return naive_model().predict(completions)


def learned_within(rows, features):
    """Weights of features in the chance that a post's like goes to a reply, circumstances beside them."""
    table = pd.DataFrame(np.hstack([circumstances(rows), features])).set_axis(
        [f"x{place}" for place in range(3 + features.shape[1])], axis=1)
    likes = rows["reply_likes"].to_numpy(float)
    posts = rows["conversation_id"].to_numpy()
    return conditional_poisson(np.log1p(likes), table, posts, np.ones(len(rows)), 40.0)["estimate"].to_numpy()[3:]


def circumstances(rows):
    """Log followers, log delay, log place among the post's replies, standardised: (n, 3)."""
    place = rows.groupby("conversation_id")["reply_time_diff_seconds"].rank(method="first")
    table = np.column_stack([np.log1p(rows["reply_author_followers"]), np.log1p(rows["reply_time_diff_seconds"]),
                             np.log(place)])
    return (table - table.mean(axis=0)) / table.std(axis=0)


class Grams:
    """The reply's n-grams in 60 dimensions of unit scale, fitted on `texts`."""

    def __init__(self, texts):
        self.grams = tfidf().fit(texts)
        self.reduce = TruncatedSVD(60, random_state=0).fit(self.grams.transform(texts))
        self.scale = self.reduce.transform(self.grams.transform(texts)).std()

    def __call__(self, texts):
        return self.reduce.transform(self.grams.transform(texts)) / self.scale


@cache
def ngram_model():
    features = Grams(train()["reply"])
    return features, learned_within(train(), features(train()["reply"]))


def ngrams(completions):
    features, weights = ngram_model()
    return features(completions) @ weights


def sentences(posts, replies):
    """MiniLM's embeddings of the reply and of its product with the post's."""
    ours, theirs = embed(list(replies)), embed(list(posts))
    return np.hstack([ours, ours * theirs]) * np.sqrt(ours.shape[1])


@cache
def embedding_model():
    return learned_within(train(), sentences(train()["tweet"], train()["reply"]))


def embeddings(completions, post):
    return sentences(post, completions) @ embedding_model()


@cache
def stored(column):
    """(post, reply) -> the score that the release holds: of the run whose policies it has."""
    replies = read_part("replies").loc[(scores := read_part("scores").set_index("row")).index]
    real = pd.DataFrame({"post": replies["tweet"], "text": replies["reply"], column: scores[column]})
    samples = [real, policy_sample("candidates"), *judge_samples().values()]
    return pd.concat(samples).drop_duplicates(["post", "text"]).set_index(["post", "text"])[column].to_dict()


def reward_of_the_run(completions, post):
    return [stored("reward")[pair] for pair in zip(post, completions, strict=True)]


def judge_of_the_run(completions, post):
    return [stored("judge")[pair] for pair in zip(post, completions, strict=True)]


# Learners: (train, posts, replies) -> a score for each reply.
def learn_random(train, posts, replies):
    return random(replies, posts)


def learn_length(train, posts, replies):
    return length(replies)


def learn_naive(train, posts, replies):
    model = make_pipeline(tfidf(), Ridge(alpha=3.0)).fit(train["reply"], np.log1p(train["reply_likes"]))
    return model.predict(replies)


def learn_between(train, posts, replies):
    """What is left of log likes after a regression over all rows on circumstances and the post's likes."""
    design = sm.add_constant(np.column_stack([circumstances(train), np.log1p(train["tweet_likes"])]))
    likes = np.log1p(train["reply_likes"])
    left = likes - sm.OLS(likes, design).fit().predict(design)
    return make_pipeline(tfidf(), Ridge(alpha=3.0)).fit(train["reply"], left).predict(replies)


def learn_within(train, posts, replies):
    features = Grams(train["reply"])
    return features(replies) @ learned_within(train, features(train["reply"]))


if __name__ == "__main__":  # as an entry, this file has another name
    from grpo_engage.run.bench import print_bench

    for track, names in (("reward", SCORES), ("judge", SCORES), ("deconfounding", LEARNERS)):
        for name in names:
            if name in sys.argv[1:] or not sys.argv[1:]:
                print_bench(track, f"{__file__}:{name}")
