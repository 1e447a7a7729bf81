"""How long do the text metrics take? Self-BLEU against nltk, and a whole evaluation's worth of made-up replies.

`python benchmarks/metrics_speed.py` prints both and writes benchmarks/metrics_speed.csv: Self-BLEU of n replies by ours
and by nltk (same value to 1e-9), and 4 arms x 3 seeds x 500 posts x 16 replies of about 20 words on every text metric.
Embeddings are left out. One process; nltk takes minutes at n = 1,000.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from grpo_engage.core import write_csv
from grpo_engage.evaluation import (
    CopiedSpans,
    distinct_n,
    ead,
    ngram_vectors,
    pass_at_k,
    rouge_l,
    safety_flags,
    self_bleu,
    vendi,
)
from grpo_engage.metrics import words


def texts(rng, n, vocabulary=2000, mean_length=20):
    """Replies of about `mean_length` words whose frequencies follow Zipf's law, as in real text."""
    share = 1 / np.arange(1, vocabulary + 1)
    lengths = np.clip(rng.poisson(mean_length, size=n), 1, None)
    drawn = rng.choice(vocabulary, p=share / share.sum(), size=lengths.sum())
    return [" ".join(f"w{i}" for i in part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


def nltk_self_bleu(batch):
    """The definition through nltk's sentence_bleu: each text against all others."""
    cut, smoothing = [words(text) for text in batch], SmoothingFunction(epsilon=0.1).method1
    return float(np.mean([sentence_bleu(cut[:i] + cut[i + 1:], cut[i], smoothing_function=smoothing,
                                        auto_reweigh=True) for i in range(len(cut))]))


def timed(function, *arguments):
    """The result, and the processor seconds it took: on a shared machine the clock on the wall times the neighbours."""
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def self_bleu_row(n, seed=0):
    batch = texts(np.random.default_rng(seed), n)
    ours, seconds = min((timed(self_bleu, batch) for _ in range(3)), key=lambda pair: pair[1])
    theirs, nltk_seconds = timed(nltk_self_bleu, batch)
    if abs(ours - theirs) > 1e-9:
        raise AssertionError(f"Self-BLEU of {n} texts: ours {ours}, nltk {theirs}")
    return {"what": f"Self-BLEU, n = {n}", "seconds": seconds, "nltk_seconds": nltk_seconds,
            "ratio": nltk_seconds / seconds, "difference": abs(ours - theirs)}


def score_all(arms=4, seeds=3, posts=500, samples=16, references=5, seed=0):
    """Seconds for every metric over arms x seeds x posts groups of `samples` replies."""
    rng = np.random.default_rng(seed)
    groups = arms * seeds * posts
    replies, tweets = texts(rng, groups * samples), texts(rng, posts)
    real = np.array(texts(rng, posts * references), dtype=object).reshape(posts, references).tolist()
    training = CopiedSpans(texts(rng, 5000))
    index = [CopiedSpans([tweet]) for tweet in tweets]
    clock = dict.fromkeys(["self_bleu", "distinct_2", "ead", "vendi_ngrams", "rouge_l", "copied_from_post",
                           "copied_from_training", "length", "safety", "pass_at_k"], 0.0)

    def count(name, function, *arguments):
        clock[name] += timed(function, *arguments)[1]

    for group in range(groups):
        batch, post = replies[group * samples:(group + 1) * samples], group % posts
        count("self_bleu", self_bleu, batch)
        count("distinct_2", distinct_n, batch, 2)
        count("ead", ead, batch, 50_000)
        count("vendi_ngrams", lambda b: vendi(ngram_vectors(b)), batch)
        count("rouge_l", lambda b, p: [rouge_l(text, real[p]) for text in b], batch, post)
        count("copied_from_post", lambda b, p: [index[p].longest(text) for text in b], batch, post)
        count("copied_from_training", lambda b: [training.longest(text) for text in b], batch)
        count("length", lambda b: [len(words(text)) for text in b], batch)
    count("safety", safety_flags, [tweets[group % posts] for group in range(groups) for _ in range(samples)], replies)
    count("pass_at_k", pass_at_k, samples, rng.integers(0, samples + 1, size=(groups, 1)), np.arange(1, samples + 1))
    return clock


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="*", default=[16, 100, 1000], help="sizes for the comparison with nltk")
    parser.add_argument("--posts", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    start = time.perf_counter()
    clock = score_all(posts=options.posts)
    wall = time.perf_counter() - start
    rows = [{"what": name, "seconds": seconds} for name, seconds in clock.items()]
    rows.append({"what": f"all, 4 arms x 3 seeds x {options.posts} posts x 16", "seconds": sum(clock.values()),
                 "wall_seconds": wall})
    rows += [self_bleu_row(n) for n in options.n]
    table = pd.DataFrame(rows)
    write_csv(options.out, table)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
