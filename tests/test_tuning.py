"""benchmarks/tuning.py: who wins by how much, by hand; a tiny run of the whole, cut off and gone on with."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import REPO_ROOT, file_sha256, read_json
from grpo_engage.evaluation.settings import EvaluationSettings
from grpo_engage.text.metrics import pass_at_k

specification = importlib.util.spec_from_file_location("tuning", REPO_ROOT / "benchmarks" / "tuning.py")
tuning = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tuning)

SETTINGS = EvaluationSettings.make(temperatures=[0.5])
GUARDS = {f"guard_{name}": False for name in ("empty", "echo", "spam", "toxic")}
TRIES = [("baseline", 1.0), ("baseline", 2.0), ("grpo", 1.0), ("grpo", 2.0)]


def made_up(levels, n_posts=40):
    """Scored replies: level of each system's scores -> 16 replies to each of the same posts."""
    rng = np.random.default_rng(0)
    ease = rng.normal(0, 0.1, n_posts)
    rows = [(system, 0, f"p{post:02d}", sample, np.clip(level + ease[post] + rng.normal(0, 0.15), 0, 1))
            for system, level in levels.items() for post in range(n_posts) for sample in range(16)]
    return pd.DataFrame(rows, columns=["arm", "seed", "post", "sample", "judge"]).assign(**GUARDS)


def test_a_try_is_taken_at_its_best_temperature_and_held_against_the_arms_own_rate_by_post():
    levels = {"baseline": 0.40, "baseline_T0.5": 0.45, "baseline_x2": 0.46, "baseline_x2_T0.5": 0.30, "grpo": 0.50,
              "grpo_T0.5": 0.2, "grpo_x2": 0.3, "grpo_x2_T0.5": 0.4}
    scored = made_up(levels)
    found = tuning.compared(scored, TRIES, SETTINGS).set_index(["arm", "factor"])
    assert found["temperature"].tolist() == [0.5, 1.0, 1.0, 0.5] and found["tau"].nunique() == 1
    assert found.loc[("baseline", 1.0), "pass@10"] == pytest.approx(0.6, abs=0.03)  # which the mark aims at
    tau = found["tau"].iloc[0]

    def by_post(system):
        counts = (scored[scored["arm"] == system].set_index("post")["judge"] >= tau).groupby("post").sum()
        return np.array([pass_at_k(16, int(count), 10) for count in counts])

    for arm, factor, system, own in (("grpo", 2.0, "grpo_x2_T0.5", "grpo"),
                                     ("baseline", 2.0, "baseline_x2", "baseline_T0.5")):
        row, ahead = found.loc[(arm, factor)], by_post(system) - by_post(own)
        assert row["pass@10"] == pytest.approx(by_post(system).mean())
        assert (row["ahead"], row["ahead_se"]) == pytest.approx((ahead.mean(), ahead.std(ddof=1) / np.sqrt(40)))
    assert found.loc[("grpo", 1.0), "ahead"] == 0 and found.loc[("grpo", 1.0), "chosen"]


@pytest.mark.parametrize(("ahead", "error", "winner"), [(0.05, 0.02, 2.0), (0.05, 0.06, 1.0), (-0.05, 0.02, 1.0)])
def test_another_rate_is_chosen_only_where_it_is_ahead_by_more_than_its_standard_error(ahead, error, winner):
    table = pd.DataFrame({"arm": "grpo", "factor": [1.0, 0.5, 2.0], "pass@10": [0.6, 0.58, 0.6 + ahead],
                          "ahead": [0.0, -0.02, ahead], "ahead_se": [0.0, 0.01, error]})
    chosen = tuning.with_choice(table)
    assert chosen.loc[chosen["chosen"], "factor"].tolist() == [winner]


TINY = ["arms=[baseline, grpo]", "max_steps=2", "train.batch_size=4", "posts_per_step=2", "num_generations=4",
        "reward=heuristic", "max_new_tokens=6", "temperatures=[0.5]", "n_validation_posts=3"]


class Killed(Exception):
    pass


def test_a_tiny_run_tries_each_arm_as_often_on_validation_alone_and_goes_on_where_it_was(
        small_world, tmp_path, monkeypatch):
    trained, looked_at, stage, score = [], set(), tuning.train_stage, tuning.score_replies

    def noted(folder, settings):
        if len(trained) == 3:
            trained.append("killed")
            raise Killed
        trained.append((settings.arm, settings.learning_rate(settings.objective())))
        return stage(folder, settings)

    def seen(replies, posts, *others):
        looked_at.update(posts["post"])
        return score(replies, posts, *others)

    monkeypatch.setattr(tuning, "train_stage", noted)
    monkeypatch.setattr(tuning, "score_replies", seen)
    call = dict(out=tmp_path / "tuning.csv", preset="smoke", factors=[2], work=tmp_path / "work", run=small_world,
                overrides=TINY)
    with pytest.raises(Killed):
        tuning.tune(**call)
    assert pd.read_csv(tmp_path / "tuning.csv")["arm"].tolist() == ["baseline", "baseline", "grpo"]
    table = tuning.tune(**call)
    assert trained == [("baseline", 1e-3), ("baseline", 2e-3), ("grpo", 5e-4), "killed", ("grpo", 1e-3)]
    pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "tuning.csv"), check_dtype=False)
    assert table.columns.tolist() == tuning.COLUMNS and (table["n_posts"] == 3).all()
    assert table.groupby("arm")["chosen"].sum().eq(1).all() and table["pass@10"].between(0, 1).all()
    pairs = pd.read_parquet(small_world / "data" / "pairs.parquet")
    assert set(pairs.loc[pairs["conversation_id"].isin(looked_at), "split"]) == {"validation"}
    # every try of grpo starts from the baseline at the baseline's own rate
    starts = [next(digest for path, digest in read_json(
        tmp_path / "work" / name / "train" / "grpo" / "seed0" / "manifest.json")["inputs"].items() if path.endswith(
            "train/baseline/seed0/adapter")) for name in ("grpo", "grpo_x2")]
    own = tmp_path / "work" / "baseline" / "train" / "baseline" / "seed0" / "adapter"
    assert starts == [file_sha256(own)] * 2
    tuning.tune(**call | {"overrides": [*TINY, "max_steps=1"]})  # tries of other settings are no tries of these
    assert len(trained) == 9


def test_what_cannot_be_tuned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="each must be above 0"):
        tuning.tune(tmp_path / "x.csv", "smoke", [-1], tmp_path)
    with pytest.raises(ValueError, match="needs a baseline"):
        tuning.tune(tmp_path / "x.csv", "smoke", [1], tmp_path, overrides=["arms=[polychromic]"])


COMMITTED = REPO_ROOT / "benchmarks" / "tuning.csv"


@pytest.mark.skipif(not COMMITTED.exists(), reason="without the table the paper says that no rate was tuned")
def test_the_committed_table_gives_each_arm_as_many_tries():
    table = pd.read_csv(COMMITTED)
    assert table.columns.tolist() == tuning.COLUMNS
    assert table.groupby("arm").size().nunique() == 1 and table.groupby("arm")["chosen"].sum().eq(1).all()
    assert (table.loc[table["factor"] == 1, "ahead"] == 0).all()
