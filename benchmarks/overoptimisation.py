"""Best-of-n by every reward of a finished run: what is truly gained, and when it turns.

    python benchmarks/overoptimisation.py outputs/runs/smoke OUT [--posts 48] [--replies 128]

Samples replies to validation posts from the base policy of the run, scores them with the heuristic, the learned, the
combined (several weights) and the penalised reward, and writes curves.csv, peaks.csv, paired.csv (each reward against
the mixture 0.6 / 0.4, post by post), replies.csv (the most over- and under-rated replies with their components) and
curves.{pdf,png} into OUT. Judges: the judge model and, on simulated data, gold appeal. The test split is not touched.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.core import read_json, savefig, say, write_csv
from grpo_engage.data import load_pairs
from grpo_engage.gold import gold_appeal
from grpo_engage.heuristic_reward import DEFAULT_WEIGHTS, HeuristicReward
from grpo_engage.overoptimisation import compare_picks, curves, curves_figure, fit_peak, misjudged
from grpo_engage.policy import generate_replies, load_policy, read_policy
from grpo_engage.reward_model import EngagementRewardModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--posts", type=int, default=48)
    parser.add_argument("--replies", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pairs = load_pairs(given.run)
    posts = pairs[pairs["split"] == "validation"].drop_duplicates("conversation_id").sort_values("row")
    posts = posts.sample(min(given.posts, len(posts)), random_state=given.seed)["tweet"].tolist()
    quantization = read_json(given.run / "policy" / "policy.json")["quantization"]
    made = generate_replies(*load_policy(read_policy(given.run), quantization), posts, n=given.replies, batch_size=256,
                            seed=given.seed, label="candidates, batches")
    tweets, replies = [posts[post] for post in made["post"]], made["text"].tolist()
    say(f"{len(replies)} candidates for {len(posts)} posts")
    heuristic = HeuristicReward().explain(tweets, replies)
    model = EngagementRewardModel.load(given.run / "reward_model" / "reward")
    learned, doubt = model.score_and_uncertainty(tweets, replies)
    rules = heuristic["score"].to_numpy()
    scores = {"heuristic": rules, "learned": learned,
              **{f"combined {weight:.1f}": weight * learned + (1 - weight) * rules
                 for weight in (0.3, 0.5, 0.6, 0.7, 0.8)},
              "learned - std": np.clip(learned - doubt, 0, 1), "learned - 3 std": np.clip(learned - 3 * doubt, 0, 1)}
    targets = {"judge": EngagementRewardModel.load(given.run / "reward_model" / "judge").score(tweets, replies)}
    if (pairs["source"] == "simulator").all():
        targets["gold"] = gold_appeal(tweets, replies)
    shaped = {name: {key: values.reshape(len(posts), -1) for key, values in group.items()}
              for name, group in (("proxies", scores), ("targets", targets))}
    table = curves(shaped["proxies"], shaped["targets"], seed=given.seed)
    peaks = pd.DataFrame([{"proxy": proxy, "target": target} | fit_peak(part)
                          for (proxy, target), part in table.groupby(["proxy", "target"], sort=False)])
    truth = targets.get("gold", targets["judge"])
    details = heuristic[["guard", *DEFAULT_WEIGHTS]].assign(uncertainty=doubt)
    examples = misjudged(pd.DataFrame({"tweet": tweets, "reply": replies}), learned, truth, details, n=20)
    against = pd.concat([compare_picks(shaped["proxies"], target, "combined 0.6", n, given.seed).assign(target=name)
                         for name, target in shaped["targets"].items() for n in (16, 128) if n <= given.replies])
    given.out.mkdir(parents=True, exist_ok=True)
    for name, frame in (("curves", table), ("peaks", peaks), ("replies", examples), ("paired", against)):
        write_csv(given.out / f"{name}.csv", frame)
    savefig(curves_figure(table), given.out / "curves")
    print(peaks[peaks["target"] != "proxy"].round(3).to_string(index=False))
    print(against.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
