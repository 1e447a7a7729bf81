"""The gate on a file of pairs: do a linear MiniLM reward, TF-IDF and noise add to length and tuned TF-IDF?

    python benchmarks/gate.py PAIRS.jsonl.gz OUT.csv [--seed 0]

The file is split into conversations as by the preset pheme-cpu (30% policy, 35% reward, 20% judge, 5% validation, 10%
test), of all conversations with three replies or more; reward and judge are that preset's models (linear; MiniLM and
n-grams), trained on their own splits, and asked by `gate_model` on what they did not see outside `test`. `copy` is the
tuned TF-IDF's own score with noise of half its spread, `noise` draws at random; both must not be validated. Beside
the verdicts: accuracy on the same clear pairs, on those in which the later reply won, and by event (`meta.event`).
Nothing in PHEME is fresh: every event was read while the models were made.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_engage.base.core import child_seed, say, write_csv
from grpo_engage.data.reading import read_pairs
from grpo_engage.data.splitting import split_conversations
from grpo_engage.rewards.circumstances import deconfound
from grpo_engage.rewards.engagement_model import EngagementRewardModel
from grpo_engage.rewards.gate import gate, tuned_tfidf, unseen_replies
from grpo_engage.rewards.heuristic import clear_pairs
from grpo_engage.rewards.validation import accuracy, by_event

FRACTIONS = (0.30, 0.35, 0.20, 0.05, 0.10)
LINEAR = {"hidden_size": 0, "weight_decay": 30.0, "learning_rate": 3e-4, "epochs": 15, "control": "offset"}


def described(rows: pd.DataFrame, scores: np.ndarray, seed: int) -> dict:
    """Accuracy on clear pairs, on those that the later reply won, and by event."""
    posts, delay = rows["conversation_id"].to_numpy(), rows["reply_time_diff_seconds"].to_numpy(float, na_value=np.nan)
    higher, lower = clear_pairs(posts, rows["reply_likes"])
    later = delay[higher] > delay[lower]
    found = {"clear": accuracy(scores, higher, lower, posts, seed),
             "later": accuracy(scores, higher[later], lower[later], posts, seed)}
    found |= {row.pop("event"): row for row in by_event(scores, rows, higher, lower, seed)}
    return {f"{kind} {part}": value for kind, row in found.items() for part, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    table = read_pairs(given.pairs)[0]
    table = table[table.groupby("conversation_id")["reply"].transform("size") >= 3].reset_index(drop=True)
    table = split_conversations(table, FRACTIONS, given.seed).reset_index(drop=True)
    labels = deconfound(table, ~table["split"].isin(["validation", "test"]))[0]
    rows = []
    for name, backbone in (("reward", "minilm"), ("judge", "hashing")):
        own = (table["split"] == name) & np.isfinite(labels["engagement"])
        model = EngagementRewardModel(backbone, **LINEAR).fit(
            table[own], labels.loc[own, ["residual", "engagement", "expected"]], child_seed(given.seed, name))
        asked = unseen_replies(table, name, given.seed)
        texts = asked["tweet"].tolist(), asked["reply"].tolist()
        words = tuned_tfidf(table[own], texts[1], given.seed)
        random = np.random.default_rng(child_seed(given.seed, "noise", name))
        scores = {name: model.logits(*texts), f"{name}'s TF-IDF": words, f"{name}'s TF-IDF, noisy copy":
                  words + random.normal(0, 0.5 * words.std(), len(words)), "noise": random.normal(size=len(words)),
                  "length": asked["reply"].str.len().to_numpy(float)}
        for scorer, values in scores.items():
            found = gate(asked, values, words, seed=given.seed)
            say(f"{scorer}: {found['text']}")
            rows.append({"asked": name, "scorer": scorer} | found | described(asked, values, given.seed))
            write_csv(given.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
