"""Advantages, losses, resuming and failures of the two training functions; the arms and the pilot's verdict."""

import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from training import make_grpo_trainer, train_grpo, train_supervised
from transformers import TrainerCallback
from trl import GRPOTrainer

from grpo_engage.base.core import REPO_ROOT, file_sha256
from grpo_engage.policy.sampling import load_policy, reply_nll
from grpo_engage.train.advantages import group_advantage, less_other_groups
from grpo_engage.train.arm_training import largest_divisor
from grpo_engage.train.hybrid import pilot_verdict, train_stage
from grpo_engage.train.loop import kept_marks, tidy_log
from grpo_engage.train.objective import ARMS, Objective, trainable_arm
from grpo_engage.train.stopping import RewardError, checked_scores


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise Killed


@pytest.fixture(scope="module")
def baseline(base, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    train_supervised(base, pairs, folder, max_steps=2, learning_rate=1e-3, batch_size=8)
    return folder / "adapter"


def brevity(posts, replies):
    return np.array([math.exp(-len(reply) / 40) for reply in replies])


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_group_advantage_by_brute_force():
    rewards = np.random.default_rng(0).random((5, 4))
    for group, advantages in zip(rewards.tolist(), group_advantage(rewards).tolist(), strict=True):
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        assert advantages == pytest.approx([(r - mean) / (std + 1e-4) for r in group])


def test_the_baseline_of_a_group_is_the_mean_of_the_others():
    credit = np.random.default_rng(1).random((4, 3)) + np.arange(4)[:, None]
    by_hand = [[value - np.mean([other for h, row in enumerate(credit) if h != g for other in row]) for value in group]
               for g, group in enumerate(credit)]
    np.testing.assert_allclose(less_other_groups(credit), by_hand)
    np.testing.assert_array_equal(less_other_groups(credit[:1]), credit[:1])  # no other group, no baseline


@pytest.mark.parametrize("bad", [[0.1, 0.2], [[0.1]], [[0.1, math.inf]]])
def test_group_advantage_refuses(bad):
    with pytest.raises(ValueError):
        group_advantage(np.array(bad))


@pytest.mark.parametrize("weights", [(0, 0, 0), (-1, 0, 0), (math.nan, 1, 0), (math.inf, 0, 0), (True, 0, 0),
                                     ("1", 0, 0)])
def test_objective_refuses(weights):
    with pytest.raises(ValueError, match="Objective"):
        Objective(*weights)


def test_all_four_arms_are_settings_of_one_objective(tmp_path):
    weights = [(arm.alpha, arm.beta, arm.lam) for arm in map(trainable_arm, ARMS)]
    assert weights == [(1, 0, 0), (1, 0, 0.3), (0, 1, 0), (0.3, 0.5, 0.2)]
    assert ARMS["grpo"].warm_start == "baseline" and ARMS["hybrid"].warm_start == "baseline"
    with pytest.raises(ValueError, match="'rgpo'"):
        trainable_arm("rgpo")
    with pytest.raises(ValueError, match="start from itself"):
        train_stage(tmp_path, arm="polychromic", warm_start="polychromic")
    assert not list(tmp_path.iterdir())


def test_supervised_loss_is_the_nll_of_replies_with_their_end(base, pairs, tmp_path):
    """A fresh LoRA adapter changes nothing, so the first loss must be the base model's NLL: the same prompts, only
    reply tokens, the end token among them, averaged over all tokens of a window with replies of unequal length."""
    few = pairs.head(8)
    log = train_supervised(base, few, tmp_path, max_steps=1, learning_rate=1e-3, batch_size=8, micro_batch_size=2)
    table = reply_nll(*load_policy(base), few["tweet"].tolist(), few["reply"].tolist())
    assert table["n_tokens"].nunique() > 1
    assert log["loss"][0] == pytest.approx(table["nll"].sum() / table["n_tokens"].sum(), rel=1e-3)


def test_supervised_training_fits_its_examples(base, pairs, tmp_path):
    log = train_supervised(base, pairs.head(16), tmp_path, max_steps=15, learning_rate=2e-3, batch_size=16)
    assert log["loss"].iloc[-1] < 0.8 * log["loss"].iloc[0]
    with pytest.raises(ValueError, match="at least one reference"):
        train_supervised(base, pairs.head(0), tmp_path, max_steps=1, learning_rate=1e-3)


def test_grpo_uses_our_advantage_and_starts_at_the_warm_start(base, pairs, baseline, tmp_path):
    trainer = make_grpo_trainer(base, pairs["tweet"], brevity, tmp_path, max_steps=2, learning_rate=5e-4,
                                warm_start=baseline, posts_per_step=3, num_generations=4)
    reference = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    start = load_file(baseline / "adapter_model.safetensors")
    name, weight = next(iter(start.items()))
    assert torch.equal(reference["base_model.model." + name.removeprefix("base_model.model.").replace(
        ".weight", ".ref.weight")], weight)
    trainer.train()
    assert all(torch.equal(p, reference[name]) for name, p in trainer.model.named_parameters() if name in reference)
    rewards = np.array(trainer._logs["rewards"]["reward"]).reshape(-1, 4)
    used = np.array(trainer._logs["advantages"]).reshape(-1, 4)
    np.testing.assert_allclose(used, group_advantage(rewards), atol=2e-3)
    log = tidy_log(trainer.state.log_history)
    assert log["kl"][0] == pytest.approx(0, abs=1e-6) and log["kl"][1] > 0  # nats per reply, from the warm start
    assert log["reward"].between(0, 1).all() and log["zero_variance_share"].between(0, 1).all()


def test_grpo_raises_an_easy_reward(base, pairs, baseline, tmp_path):
    # 16 steps left it to the processor's rounding whether the rise could be told from noise; 30 triple the reward
    log = train_grpo(base, pairs["tweet"], brevity, tmp_path, reward_id="brevity", warm_start=baseline, max_steps=30,
                     learning_rate=1e-3, posts_per_step=4, num_generations=8, kl_weight=0.0, max_new_tokens=16)
    assert pilot_verdict(log)["reward_rising"]["answer"] == "yes"
    assert log["kl"].isna().all()  # no KL term, so none is logged: not a zero


KILLED = dict(reward_id="brevity", max_steps=5, learning_rate=1e-3, posts_per_step=4, num_generations=4,
              micro_batch_size=8, max_new_tokens=12, save_steps=2, marks=[1, 2, 5, 9])


@pytest.fixture(scope="module")
def whole(base, pairs, baseline, tmp_path_factory):
    """A run with KILLED that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    train_grpo(base, pairs["tweet"], brevity, folder, **KILLED, warm_start=baseline)
    assert kept_marks(folder) == [1, 2]  # after step 5 it is the adapter itself
    return folder


@pytest.mark.parametrize("kill_at", [1, 3, 4])
def test_a_killed_grpo_run_ends_with_the_same_bytes(base, pairs, baseline, whole, tmp_path, kill_at):
    options = KILLED | {"warm_start": baseline}
    with pytest.raises(Killed):
        train_grpo(base, pairs["tweet"], brevity, tmp_path / "cut", **options, callbacks=[KillAfter(kill_at)])
    assert not (tmp_path / "cut" / "adapter").exists()
    log = train_grpo(base, pairs["tweet"], brevity, tmp_path / "cut", **options)
    assert log["step"].tolist() == [1, 2, 3, 4, 5]
    assert file_sha256(tmp_path / "cut") == file_sha256(whole)  # adapter, its config and the log


def test_a_mark_is_the_adapter_of_a_run_that_ended_there_and_changes_nothing(base, pairs, baseline, tmp_path):
    options = dict(reward_id="brevity", warm_start=baseline, learning_rate=1e-3, posts_per_step=4, num_generations=4,
                   max_new_tokens=12)
    train_grpo(base, pairs["tweet"], brevity, tmp_path / "marked", **options, max_steps=3, marks=[2])
    for name, max_steps in (("short", 2), ("plain", 3)):
        train_grpo(base, pairs["tweet"], brevity, tmp_path / name, **options, max_steps=max_steps)
    marked = tmp_path / "marked"
    assert file_sha256(marked / "marks" / "2") == file_sha256(tmp_path / "short" / "adapter")
    assert adapter_bytes(marked) == adapter_bytes(tmp_path / "plain") != adapter_bytes(tmp_path / "short")
    train_grpo(base, pairs["tweet"], brevity, marked, **options, max_steps=3)
    assert kept_marks(marked) == []  # an earlier run's are gone


def test_a_killed_supervised_run_ends_with_the_same_bytes(base, pairs, tmp_path):
    options = dict(max_steps=5, learning_rate=1e-3, batch_size=8, micro_batch_size=4, save_steps=2)
    train_supervised(base, pairs, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        train_supervised(base, pairs, tmp_path / "cut", **options, callbacks=[KillAfter(3)])
    train_supervised(base, pairs, tmp_path / "cut", **options)
    assert file_sha256(tmp_path / "cut") == file_sha256(tmp_path / "whole")


def test_a_checkpoint_of_other_settings_is_not_resumed(base, pairs, tmp_path):
    options = dict(max_steps=3, batch_size=8, save_steps=1)
    with pytest.raises(Killed):
        train_supervised(base, pairs, tmp_path / "a", learning_rate=1e-2, **options, callbacks=[KillAfter(2)])
    train_supervised(base, pairs, tmp_path / "a", learning_rate=1e-3, **options)
    train_supervised(base, pairs, tmp_path / "b", learning_rate=1e-3, **options)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


def test_seeds_differ(base, pairs, tmp_path):
    for seed in (0, 1):
        train_supervised(base, pairs, tmp_path / str(seed), max_steps=1, learning_rate=1e-3, seed=seed)
    assert adapter_bytes(tmp_path / "0") != adapter_bytes(tmp_path / "1")


def test_a_reward_that_raises_names_post_and_completion(base, pairs, tmp_path):
    seen = []

    def picky(posts, replies):
        seen.extend(zip(posts, replies, strict=True))
        if seen[2] in zip(posts, replies, strict=True):
            raise ZeroDivisionError("no such thing")
        return np.zeros(len(replies))

    options = dict(reward_id="picky", max_steps=1, learning_rate=1e-3, posts_per_step=2, num_generations=2)
    with pytest.raises(RewardError, match="no such thing") as caught:
        train_grpo(base, pairs["tweet"], picky, tmp_path, **options)
    assert repr(seen[2][0][:200]) in str(caught.value) and repr(seen[2][1][:200]) in str(caught.value)
    with pytest.raises(RewardError, match="shape"):
        train_grpo(base, pairs["tweet"], lambda posts, replies: np.zeros(1), tmp_path, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_its_reply(value):
    with pytest.raises(RewardError, match=r"is (nan|-?inf) \(step 3, post 'b', completion 'y 👍'\)"):
        checked_scores(lambda posts, replies: [0.5, value, 0.1], ["a", "b", "c"], ["x", "y 👍", "z"], 3)


def test_each_epoch_has_an_order_of_its_own_which_is_trls(base, pairs, tmp_path):
    trainer = make_grpo_trainer(base, pairs["tweet"], brevity, tmp_path, max_steps=1, learning_rate=1e-3,
                                posts_per_step=3, num_generations=2)
    stock, orders = GRPOTrainer._get_train_sampler(trainer), []
    for epoch in range(3):
        trainer.state.epoch = float(epoch)
        orders.append(list(trainer._get_train_sampler()))
        assert orders[-1] == list(stock)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_kl_is_logged_by_reply():
    logged = {"step": 1, "loss": 0.0, "completions/mean_length": 12.5}
    log = tidy_log([logged | {"kl": 0.02}, {"step": 2, "loss": 0.0}, {"train_runtime": 1.0}])
    assert log["kl"][0] == pytest.approx(0.25) and log["kl_per_token"][0] == 0.02 and np.isnan(log["kl"][1])


def test_bad_sizes_are_refused(base, pairs, tmp_path):
    options = dict(max_steps=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match="different posts"):
        make_grpo_trainer(base, ["one", "one"], brevity, tmp_path, posts_per_step=2, **options)
    with pytest.raises(ValueError, match="'num_generations' = 1 is outside"):
        make_grpo_trainer(base, pairs["tweet"], brevity, tmp_path, num_generations=1, **options)
    with pytest.raises(ValueError, match="report_to"):
        make_grpo_trainer(base, pairs["tweet"], brevity, tmp_path, report_to="mlflow", **options)
    assert [largest_divisor(64, 64), largest_divisor(64, 24), largest_divisor(7, 4)] == [64, 16, 1]


def test_pilot_verdict_tells_apart():
    rng = np.random.default_rng(1)
    empty = {"loss": np.nan, "reward": np.nan}
    rising = pd.DataFrame({"step": range(1, 41)} | empty).assign(reward=np.linspace(0, 1, 40) + rng.normal(0, 0.2, 40))
    assert pilot_verdict(rising)["reward_rising"]["answer"] == "yes"
    assert pilot_verdict(rising.head(4))["reward_rising"]["answer"] == "too few steps to tell"
    falling = pd.DataFrame({"step": range(1, 13)} | empty).assign(loss=np.linspace(2, 1, 12))
    verdict = pilot_verdict(falling)
    assert verdict["loss_falling"]["slope_per_step"] == pytest.approx(-1 / 11)
    assert verdict["text"].startswith("Is the loss falling? Yes")
    wrong = pilot_verdict(falling.assign(loss=-falling["loss"]))
    assert wrong["loss_falling"]["answer"] == "no, it moves the wrong way"


TWICE = """
import sys
from pathlib import Path
from grpo_engage.base.core import file_sha256
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy
from training import train_grpo
folder, posts = Path(sys.argv[1]), simulate_pairs(40, seed=3)["tweet"]
for name in "ab":
    train_grpo(ensure_policy("nano"), posts, lambda posts, texts: [-len(text) for text in texts], folder / name,
               reward_id="short", max_steps=4, learning_rate=1e-3, posts_per_step=4, num_generations=8,
               max_new_tokens=24)
assert file_sha256(folder / "a" / "adapter") == file_sha256(folder / "b" / "adapter"), "not the same bytes"
"""


def test_two_threads_give_the_same_bytes_again(tmp_path):
    """The gradient of an indexing adds floats in the order in which threads come, unless it is told not to.

    In a process of its own: how many threads there are is read when torch is loaded.
    """
    done = subprocess.run([sys.executable, "-c", TWICE, str(tmp_path)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": f"{REPO_ROOT}{os.pathsep}"
                                            f"{REPO_ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-500:]
