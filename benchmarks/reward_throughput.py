"""How much faster is scoring in batches than pair by pair, and are the scores the same?

    python benchmarks/reward_throughput.py OUT [--replies 512] [--backbone minilm]

Trains a small reward on simulated replies, then scores `--replies` replies of 16 to a post: all in one call (each post
embedded once, texts sorted by length) and pair by pair. Writes throughput.csv: replies per second of both, their ratio,
and the largest difference of scores, which must be at most 1e-5.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.base.core import write_csv
from grpo_engage.data.gold import gold_appeal
from grpo_engage.data.simulator import simulate_text
from grpo_engage.rewards.engagement_model import EngagementRewardModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--replies", type=int, default=512)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    table = simulate_text(80, 0)
    model = EngagementRewardModel(given.backbone, members=3, epochs=2)
    model.fit(table, gold_appeal(table["tweet"].tolist(), table["reply"].tolist()), seed=0)
    posts = table["tweet"].unique()[:max(given.replies // 16, 1)]
    other = simulate_text(200, 1)["reply"].tolist()
    post_texts = [post for post in posts for _ in range(16)]
    replies = other[:len(post_texts)]
    model.score(post_texts[:2], replies[:2])  # loading the encoder is not scoring
    seconds = {"batched": [], "pair by pair": []}
    for _ in range(given.repeats):
        start = time.perf_counter()
        batched = model.score(post_texts, replies)
        seconds["batched"].append(time.perf_counter() - start)
        start = time.perf_counter()
        singles = [model.score([post], [reply]) for post, reply in zip(post_texts, replies, strict=True)]
        single = np.concatenate(singles)
        seconds["pair by pair"].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    row = {"backbone": given.backbone, "replies": len(replies),
           **{f"replies_per_second_{name.replace(' ', '_')}": len(replies) / value for name, value in best.items()},
           "ratio": best["pair by pair"] / best["batched"], "largest_difference": float(abs(batched - single).max())}
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out / "throughput.csv", pd.DataFrame([row]))
    print(pd.Series(row).to_string())
    if row["largest_difference"] > 1e-5:
        raise SystemExit(f"batched and single scores differ by {row['largest_difference']:.2g}, more than 1e-5")


if __name__ == "__main__":
    main()
