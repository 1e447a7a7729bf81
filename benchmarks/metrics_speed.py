"""How long do the text metrics take? Self-BLEU against nltk, and a whole evaluation's worth of made-up replies.

`python benchmarks/metrics_speed.py` prints both and writes benchmarks/metrics_speed.csv: Self-BLEU of n replies by ours
and by nltk (same value to 1e-9), and 4 arms x 3 seeds x 500 posts x 16 replies of about 20 words on every text metric,
by the functions of the evaluation stage, wall time, in two processes (--jobs 1 2 checks that one gives the same).
Embeddings are left out. nltk takes minutes at n = 1,000.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from grpo_engage.base.core import write_csv
from grpo_engage.evaluation.post_metrics import metrics_by_post, read_replies
from grpo_engage.text.metrics import self_bleu, words


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


def made_up_scores(arms=4, seeds=3, posts=500, samples=16, references=5, seed=0):
    """Replies of a whole evaluation with a post, real replies and made-up judgements each, and training replies."""
    rng = np.random.default_rng(seed)
    n = arms * seeds * posts * samples
    post_texts, training = texts(rng, posts), texts(rng, 5000)
    real = np.array(texts(rng, posts * references), dtype=object).reshape(posts, references).tolist()
    frame = pd.DataFrame(np.indices((arms, seeds, posts, samples)).reshape(4, n).T,
                         columns=["arm", "seed", "post", "sample"])
    frame = frame.assign(text=texts(rng, n), judge=rng.random(n), reward=rng.random(n), gold=np.nan)
    return frame, [post_texts[post] for post in frame["post"]], [real[post] for post in frame["post"]], training


def score_all(n_jobs, **size):
    """Wall seconds of every text metric in `n_jobs` processes, as the evaluation stage computes them; and the table."""
    frame, posts, references, training = made_up_scores(**size)
    start = time.perf_counter()
    read = read_replies(posts, frame["text"].tolist(), references, training, n_jobs)
    middle = time.perf_counter()
    scored = frame.join(read).assign(passed=frame["judge"] > 0.9)
    table = metrics_by_post(scored, vocabulary_size=2000, n_jobs=n_jobs)
    end = time.perf_counter()
    return {"each reply": middle - start, "each set": end - middle, "all": end - start}, table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="*", default=[16, 100, 1000], help="sizes for the comparison with nltk")
    parser.add_argument("--posts", type=int, default=500)
    parser.add_argument("--jobs", type=int, nargs="*", default=[2], help="numbers of processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    size = f"4 arms x 3 seeds x {options.posts} posts x 16"
    rows, tables = [], []
    for n_jobs in options.jobs:
        clock, table = score_all(n_jobs, posts=options.posts)
        rows += [{"what": f"{name}, {size}", "processes": n_jobs, "wall_seconds": seconds}
                 for name, seconds in clock.items()]
        tables.append(table)
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)  # the same, whatever the number of processes
    rows += [self_bleu_row(n) for n in options.n]
    table = pd.DataFrame(rows)
    write_csv(options.out, table)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
