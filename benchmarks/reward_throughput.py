"""How much faster is scoring in batches than pair by pair, and are the scores the same?

    python benchmarks/reward_throughput.py OUT [--replies 512] [--backbone minilm]

Trains a small reward on simulated replies, then scores `--replies` replies of 16 to a post: all in one call (each post
embedded once, texts sorted by length) and pair by pair. Writes throughput.csv: replies per second of both, their ratio,
and the largest difference of scores, which must be at most 1e-5.

    python benchmarks/reward_throughput.py OUT --many 100000

Instead: all that an evaluation reads off so many replies, 16 to a post and repeating themselves as a trained policy's
do (`sampled`), in one process: the combined training reward, the judge's logits (hashed n-grams both, whose encoder is
cheap), the heuristic, gold, and guards, safety and text metrics. Writes reward_throughput.csv: seconds of CPU and
replies per second, by the different replies alone (`each_once`) and by `all`, which costs no more.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.base.core import write_csv
from grpo_engage.data.gold import gold_appeal
from grpo_engage.data.simulator import simulate_text
from grpo_engage.evaluation.post_metrics import read_replies
from grpo_engage.rewards.engagement_model import EngagementRewardModel
from grpo_engage.rewards.heuristic import HeuristicReward
from grpo_engage.rewards.reward_model import CombinedReward
from grpo_engage.text.pair_batches import score_once
from grpo_engage.text.reply_text import _count


def sampled(n: int, per_post: int = 16, seed: int = 0) -> tuple[list[str], list[str], list[list[str]]]:
    """Posts and replies (n each), and three real replies of each post. Sample k of a post is the first of ten replies
    with chance 0.3, the second with 0.21, and so on: about six of sixteen are different."""
    posts, random = simulate_text(n // per_post, seed + 1)["tweet"].unique(), np.random.default_rng(seed)
    pool = simulate_text(n // 8, seed + 2)["reply"].to_numpy()
    table = {"post": [], "reply": [], "real": []}
    for post in posts:
        said = random.choice(pool, 13)
        table["post"] += [str(post)] * per_post
        table["reply"] += said[3 + np.minimum(random.geometric(0.3, per_post) - 1, 9)].tolist()
        table["real"] += [said[:3].tolist()] * per_post
    return table["post"], table["reply"], table["real"]


def many(n: int, out: Path) -> None:
    """The table of `--many`."""
    table = simulate_text(400, 0)
    gold = gold_appeal(table["tweet"].tolist(), table["reply"].tolist())
    model = EngagementRewardModel("hashing", members=3, epochs=2).fit(table, gold, seed=0)
    posts, replies, real = sampled(n)
    combined, heuristic = CombinedReward(model), HeuristicReward()
    calls = {
        "training reward (learned and heuristic)": lambda p, r, _: combined(p, r),
        "heuristic reward": lambda p, r, _: score_once(heuristic, p, r),
        "judge (logits)": lambda p, r, _: model.logits(p, r), "gold": lambda p, r, _: score_once(gold_appeal, p, r),
        "guards, safety and text metrics": lambda p, r, of: read_replies(p, r, of, table["reply"].tolist(), 1)}
    seen = {pair: place for place, pair in reversed([*enumerate(zip(posts, replies, strict=True))])}
    first = sorted(seen.values())
    different = [[column[place] for place in first] for column in (posts, replies, real)]
    rows = []
    for what, call in calls.items():
        found = {}
        for which, batch in (("all", (posts, replies, real)), ("each_once", different)):
            _count.cache_clear()  # what another scorer has counted would be free here
            start = time.process_time()
            call(*batch)
            found[which] = time.process_time() - start
        rows.append({"what": what, "replies": n, "different": len(first), "cpu_seconds": found["all"],
                     "replies_per_second": n / found["all"], "cpu_seconds_each_once": found["each_once"],
                     "different_per_second": len(first) / found["each_once"]})
        print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "reward_throughput.csv", pd.DataFrame(rows).round(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--replies", type=int, default=512)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=0, help="so many replies that repeat themselves, by every scorer")
    given = parser.parse_args()
    if given.many:
        return many(given.many, given.out)
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
