"""Ways to train the reward, on the data of a finished run: which one recovers what matters best?

    python benchmarks/reward_ways.py RUN OUT [--ways offset,residual,window,none,minilm-lora,causal] [--posts 0]

`offset`, `residual`, `window` and `none` are the ways to keep circumstances out of the labels, with the run's own
backbone: features are made once, so only the networks differ. `minilm-lora` tunes the sentence encoder; `causal` trains
the run's base policy through TRL's RewardTrainer; `sentence:ID` and `causal:ID` read by a model of your choice.
--posts: train on that many posts of the split `reward` (0: all).
--event NAME: train without that event (meta.event), judge on it alone. --backbone: instead of the run's own.
Everything is judged on the split `validation`; `test` is not touched. Writes ways.csv into OUT.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.base.core import child_seed, read_json, say, write_csv
from grpo_engage.data.truth import gold_of
from grpo_engage.policy.replies import read_policy
from grpo_engage.rewards.engagement_model import EngagementRewardModel
from grpo_engage.rewards.heuristic import clear_pairs, pairwise_accuracy
from grpo_engage.rewards.validation import overall_spearman, within_post_spearman
from grpo_engage.stats.intervals import cluster_bootstrap

CONTROLS = ("offset", "residual", "window", "none")


def judged(way: str, seconds: float, held: pd.DataFrame, logits: np.ndarray, seed: int) -> dict:
    higher, lower = clear_pairs(held["conversation_id"], held["engagement"])
    correct = pairwise_accuracy(logits, higher, lower)
    accuracy, low, high = cluster_bootstrap(correct, held["conversation_id"].to_numpy()[higher], seed=seed)
    row = {"way": way, "accuracy": accuracy, "ci_low": low, "ci_high": high, "clear_pairs": len(higher),
           "train_seconds": seconds}
    if truth := gold_of(held):
        gold = truth(held["tweet"].tolist(), held["reply"].tolist())
        within = within_post_spearman(logits, gold, held["conversation_id"], seed)
        row |= {"gold_spearman": overall_spearman(logits, gold), "gold_within_posts": within["estimate"]}
    say(f"{way}: accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}], gold {row.get('gold_spearman', float('nan')):.3f}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", default=",".join(CONTROLS))
    parser.add_argument("--posts", type=int, default=0)
    parser.add_argument("--event", default="")
    parser.add_argument("--backbone", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3, help="of the encoder's tuning and of the causal model")
    given = parser.parse_args()
    pairs = pd.read_parquet(given.run / "data" / "pairs.parquet")
    labels = pd.read_parquet(given.run / "reward_model" / "labels.parquet")
    used = read_json(given.run / "reward_model" / "manifest.json")["parameters"]
    held = pairs[pairs["split"] == "validation"].join(labels.drop(columns="row")).dropna(subset=["engagement"])
    train = pairs[(pairs["split"] == "reward") & np.isfinite(labels["engagement"])]
    if given.event:
        event = pairs["meta"].map(lambda text: json.loads(text).get("event") if isinstance(text, str) else None)
        if not (event == given.event).any():
            raise SystemExit(f"no row has meta.event {given.event!r}; there are {sorted(set(event.dropna()))}")
        held, train = held[event[held.index] == given.event], train[event[train.index] != given.event]
    if given.posts:
        posts = np.random.default_rng(child_seed(given.seed, "posts")).permutation(train["conversation_id"].unique())
        train = train[train["conversation_id"].isin(posts[:given.posts])]
    own = labels.loc[train.index, ["residual", "engagement", "expected"]].reset_index(drop=True)
    train = train.reset_index(drop=True)
    say(f"{len(train)} replies of {train['conversation_id'].nunique()} posts; judged on {len(held)} replies")
    post_texts, replies = held["tweet"].tolist(), held["reply"].tolist()
    options = {name: used[name] for name in ("members", "hidden_size", "dropout", "learning_rate", "weight_decay",
                                             "epochs")}
    rows, first = [], None
    for way in given.ways.split(","):
        start = time.perf_counter()
        if way == "causal":
            model = EngagementRewardModel(f"causal:{read_policy(given.run)}", **options,
                                          backbone_options={"epochs": given.epochs}).fit(train, own, given.seed)
        elif way in CONTROLS:
            model = EngagementRewardModel(given.backbone or used["reward_backbone"], control=way, **options)
            if first is None:
                first = model.fit(train, own, given.seed)
            else:  # the same features; only labels and networks are new
                model.backbone, model.evidence, model.center, model.scale = (first.backbone, first.evidence,
                                                                             first.center, first.scale)
                model.train_networks(first.training_features, model.pairs_to_learn(train, own, given.seed), given.seed)
        else:
            extra = {"epochs": given.epochs} if way == "minilm-lora" else None
            model = EngagementRewardModel(way, backbone_options=extra, **options).fit(train, own, given.seed)
        rows.append(judged(way, time.perf_counter() - start, held, model.logits(post_texts, replies), given.seed))
        given.out.mkdir(parents=True, exist_ok=True)
        write_csv(given.out / "ways.csv", pd.DataFrame(rows))
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
