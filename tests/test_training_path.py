"""The path of training: what is in the table is what was watched, and nothing is made up where nothing was."""

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import write_csv, write_parquet
from grpo_engage.data.gold import gold_appeal
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.evaluation.training_path import training_path


class Longer:
    """A judge for whom length is all."""

    def logits(self, posts, replies):
        return np.array([float(len(reply)) for reply in replies])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Three watched arms (two without KL), one that was not; 2 posts, 2 replies each, looks after 0 and 4 updates."""
    monkeypatch.setattr("grpo_engage.train.watching.EngagementRewardModel.load", lambda folder: Longer())
    pairs = simulate_pairs(12, seed=2).assign(split="validation").reset_index(drop=True)
    posts = pairs["tweet"].drop_duplicates().iloc[:2].tolist()
    looks = pd.DataFrame([{"step": step, "post": post, "sample": sample, "tweet": posts[post],
                           "reply": "ok" * (1 + step + 3 * post + sample), "proxy": 0.1 * (step + post + 2 * sample)}
                          for step in (0, 4) for post in (0, 1) for sample in (0, 1)])
    log = pd.DataFrame({"step": [1, 2, 3, 4], "kl": [0.0, 0.2, 0.4, 0.6]})
    for arm, logged in (("grpo", log), ("polychromic", log.assign(kl=np.nan)), ("baseline", log.drop(columns="kl"))):
        folder = tmp_path / "train" / arm / "seed1"
        write_parquet(folder / "samples.parquet", looks)
        write_csv(folder / "train_log.csv", logged)
    return tmp_path, pairs, looks


def test_means_by_post_of_all_scores_at_the_distance_of_the_log(run):
    folder, pairs, looks = run
    path = training_path(folder, [(arm, 1) for arm in ("baseline", "polychromic", "grpo", "hybrid")], pairs)
    assert set(path["arm"]) == {"grpo"} and set(path["posts"]) == {2} and set(path["seed"]) == {1}
    wide = path.pivot(index="step", columns="score", values="mean")
    assert wide["training reward"].tolist() == pytest.approx([0.15, 0.55])  # over samples: 0.1 (step + post + 1)
    gold = gold_appeal(looks["tweet"].tolist(), looks["reply"].tolist())
    assert wide["gold"].tolist() == pytest.approx([gold[:4].mean(), gold[4:].mean()])
    real = pairs.groupby("tweet")["reply"].agg(list)
    beats = [np.mean([1 / (1 + np.exp(len(other) - len(row.reply))) for other in real[row.tweet]])
             for row in looks.itertuples()]
    assert wide["judge"].tolist() == pytest.approx([np.mean(beats[:4]), np.mean(beats[4:])])
    assert path.groupby("step")["kl"].unique().map(list).tolist() == [[0.0], [pytest.approx(0.5)]]  # 2 and 3 updates
    errors = path[path["score"] == "training reward"]["se"]
    assert errors.tolist() == pytest.approx([0.05, 0.05])  # two posts 0.1 apart: 0.1 / sqrt(2) / sqrt(2)


def test_real_data_have_no_gold(run):
    folder, pairs, _ = run
    path = training_path(folder, [("grpo", 1)], pairs.assign(source="file"))
    assert set(path["score"]) == {"training reward", "judge"}


def test_a_run_of_which_nothing_was_watched_has_no_path(run):
    folder, pairs, _ = run
    assert training_path(folder, [("hybrid", 0), ("polychromic", 1), ("baseline", 1)], pairs).empty
