"""Arms beside the four, through the stages train and evaluation: rejection, reward x diversity, a k that goes down."""

import shutil

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import file_sha256, read_json
from grpo_engage.evaluation import evaluation
from grpo_engage.run.graph import job_parameters
from grpo_engage.run.settings import load_preset, resolve_config
from grpo_engage.train.hybrid import train_stage

ARMS = ["baseline", "rejection", "grpo_product", "grpo_max"]
SIZES = ["max_steps=2", "train.batch_size=4", "posts_per_step=2", "num_generations=4", "max_new_tokens=20",
         "reward=heuristic", "watch_every=0", "report_to=none", "validation_replies=2", "train.rejection.own_samples=3",
         "train.grpo_max.max_k_steps=1", "temperatures=[]", "rivals=[]", "n_test_posts=4", "n_validation_posts=4",
         "include_base=false", "n_boot=100"]


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """A run of ARMS as the smoke preset names them, at the smallest sizes; its metrics.csv."""
    run_dir = tmp_path_factory.mktemp("run")
    shutil.copytree(small_world, run_dir, dirs_exist_ok=True)
    config = resolve_config(load_preset("smoke"), [f"arms=[{', '.join(ARMS)}]", *SIZES]) | {"preset": "smoke"}
    for arm in ARMS:
        train_stage(run_dir, **job_parameters(config, "train", arm, 0) | {"keep_checkpoints": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "draw_figures", lambda *_: [])  # half of the time, and asked of nothing here
        evaluation.evaluation_stage(run_dir, **job_parameters(config, "evaluation"))
    return run_dir, pd.read_csv(run_dir / "evaluation" / "metrics.csv").set_index(["arm", "metric"])


def facts(run_dir, arm):
    return read_json(run_dir / "train" / arm / "seed0" / "manifest.json")


def test_each_arm_has_its_rows_in_the_tables(finished):
    run_dir, metrics = finished
    for arm in ARMS:
        assert metrics.loc[(arm, "pass@10"), ["value", "ci_low", "ci_high"]].notna().all(), arm
        assert metrics.loc[(arm, "pass@10"), "n"] == 4 and metrics.loc[(arm, "judge_engagement"), "value"] > 0
    primary = pd.read_csv(run_dir / "evaluation" / "primary.csv")
    assert primary["arm"].tolist() == ARMS[1:] and primary["difference"].notna().all()
    assert set(pd.read_csv(run_dir / "evaluation" / "decision.csv")["arm"]) == set(ARMS[1:])


def test_each_arm_was_trained_by_what_its_name_says(finished):
    run_dir, _ = finished
    adapters = {arm: file_sha256(run_dir / "train" / arm / "seed0" / "adapter" / "adapter_model.safetensors")
                for arm in ARMS}
    assert len(set(adapters.values())) == len(ARMS)
    started = run_dir / "train" / "baseline" / "seed0" / "adapter"
    for arm in ARMS[1:]:
        assert facts(run_dir, arm)["objective"]["warm_start"] == "baseline"
        assert facts(run_dir, arm)["inputs"][str(started)] == file_sha256(started)
    product, lowered = (facts(run_dir, arm)["parameters"] for arm in ("grpo_product", "grpo_max"))
    assert (product["diversity_form"], product["lam"]) == ("product", -1) and lowered["diversity_form"] == "sum"
    assert (lowered["advantage"], lowered["max_k_end"], lowered["max_k_steps"]) == ("max_at_k", 1, 1)
    for arm in ("grpo_product", "grpo_max"):
        log = pd.read_csv(run_dir / "train" / arm / "seed0" / "train_log.csv")
        assert len(log) == 2 and np.isfinite(log["reward"]).all() and np.isfinite(log["loss"]).all()


def test_rejection_sampling_trains_on_replies_that_the_baseline_wrote_to_training_posts(finished):
    run_dir, _ = finished
    taken = pd.read_parquet(run_dir / "train" / "rejection" / "seed0" / "own_references.parquet")
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    assert set(taken["tweet"]) <= set(pairs.loc[pairs["split"] == "policy", "tweet"])
    long = taken.loc[taken["reply"].str.split().str.len() > 6, "reply"]  # "no comment." is also what people write
    assert len(long) and not set(long) & set(pairs["reply"]) and not taken["tweet"].duplicated().any()
    assert facts(run_dir, "rejection")["counts"]["examples"] == len(taken) > 0
    log = pd.read_csv(run_dir / "train" / "rejection" / "seed0" / "train_log.csv")
    assert np.isfinite(log["loss"]).all() and log.get("reward", pd.Series(dtype=float)).isna().all()
