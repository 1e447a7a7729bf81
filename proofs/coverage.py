"""Do 95% intervals cover the truth in 95% of experiments, for posts and training seeds as crossed factors?

Simulated paired differences (seeds x posts) whose true mean is 0. The sampling variance is that of one seed's mean
over the posts; the seed variance is 0 to 8 times that. Designs differ in where the sampling variance lies (posts or
single cells), in whether posts come in conversations, and in skewness. Beside `crossed_difference`'s interval stand
those that are often used instead. `python proofs/coverage.py` writes proofs/coverage.csv (about a minute).
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from grpo_engage.base.core import write_csv
from grpo_engage.stats.crossed import crossed_variance

N_POSTS = 60
# design: (share of the sampling variance that lies in single cells, posts in conversations, skewed)
DESIGNS = {"posts": (0.1, False, False), "even": (0.5, False, False), "cells": (0.9, False, False),
           "conversations": (0.5, True, False), "skewed": (0.5, False, True)}
SEED_VARIANCES = (0.0, 0.5, 1.0, 2.0, 8.0)


def draw(rng, size, skewed):
    """Noise with mean 0 and variance 1: normal, or a centred exponential (skewness 2)."""
    return rng.exponential(size=size) - 1 if skewed else rng.normal(size=size)


def simulate(rng, n_experiments, n_seeds, ratio, design, n_posts=N_POSTS):
    """Differences (experiments, seeds, posts) with true mean 0, and the posts' conversations (posts,)."""
    cell_share, crowded, skewed = DESIGNS[design]
    # Conversations of 1, 2 and 3 posts that share half of the posts' variance.
    conversation = np.repeat(np.arange(n_posts), np.resize([1, 2, 3], n_posts))[:n_posts] if crowded else (
        np.arange(n_posts))
    shared = draw(rng, (n_experiments, 1, n_posts), skewed)[..., conversation]
    weight = 0.5 if crowded else 0.0
    post = np.sqrt(weight) * shared + np.sqrt(1 - weight) * draw(rng, (n_experiments, 1, n_posts), skewed)
    cells = draw(rng, (n_experiments, n_seeds, n_posts), skewed)
    size = np.bincount(conversation)
    sampling = (cell_share + (1 - cell_share) * (1 - weight)) / n_posts  # variance of one seed's mean over posts
    sampling += (1 - cell_share) * weight * (size**2).sum() / n_posts**2
    seed = np.sqrt(ratio * sampling) * rng.normal(size=(n_experiments, n_seeds, 1))
    return seed + np.sqrt(1 - cell_share) * post + np.sqrt(cell_share) * cells, conversation


def half_widths(differences, conversation, rng, n_boot=1000):
    """(low, high) of each method's 95% interval, each (experiments,)."""
    n_experiments, n_seeds, n_posts = differences.shape
    mean, by_seed, by_post = differences.mean((1, 2)), differences.mean(2), differences.mean(1)

    def around(error, df):
        return mean - stats.t.ppf(0.975, df) * error, mean + stats.t.ppf(0.975, df) * error

    parts = crossed_variance(differences, conversation)
    flat = differences.reshape(n_experiments, -1)
    picked = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_boot) / n_seeds  # bootstrap of the seeds
    bootstrap = np.quantile(by_seed @ picked.T, [0.025, 0.975], axis=1)
    return {
        "crossed (ours)": around(np.sqrt(parts.total), parts.df),
        "all values independent": around(flat.std(1, ddof=1) / np.sqrt(flat.shape[1]), flat.shape[1] - 1),
        "percentile bootstrap of seeds": tuple(bootstrap),
        "t over seeds": around(by_seed.std(1, ddof=1) / np.sqrt(n_seeds), n_seeds - 1),
        "t over posts": around(by_post.std(1, ddof=1) / np.sqrt(n_posts), n_posts - 1),
    }


def coverage_rows(design, n_seeds, ratio, n_experiments, seed=0, batch=1000):
    """One row for each method: share of intervals that hold 0, share that call the null effect significant, width."""
    rng = np.random.default_rng([seed, list(DESIGNS).index(design), n_seeds, int(10 * ratio)])
    pieces = []
    for start in range(0, n_experiments, batch):
        data, conversation = simulate(rng, min(batch, n_experiments - start), n_seeds, ratio, design)
        pieces.append(half_widths(data, conversation, rng))
    rows = []
    for method in pieces[0]:
        low, high = (np.concatenate([piece[method][end] for piece in pieces]) for end in (0, 1))
        covered = float(np.mean((low <= 0) & (0 <= high)))
        rows.append({"design": design, "n_seeds": n_seeds, "seed_variance": ratio, "method": method,
                     "coverage": covered, "false_alarms": 1 - covered, "mean_width": float(np.mean(high - low)),
                     "simulation_error": float(np.sqrt(covered * (1 - covered) / n_experiments)),
                     "n_posts": N_POSTS, "n_experiments": n_experiments})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=4000, help="simulated experiments for each line")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("coverage.csv"))
    options = parser.parse_args()
    table = pd.DataFrame([row for design in DESIGNS for n_seeds in (3, 8) for ratio in SEED_VARIANCES
                          for row in coverage_rows(design, n_seeds, ratio, options.experiments)])
    write_csv(options.out, table.round(5))
    print(table.pivot(index=["design", "n_seeds", "seed_variance"], columns="method", values="coverage").round(3)
          .to_string())


if __name__ == "__main__":
    main()
