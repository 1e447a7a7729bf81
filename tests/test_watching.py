"""Watching a run, stopping it safely, and loading: nothing changes what is trained, and what is wrong is named."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator
from test_grpo_trainer import Killed, brevity
from training import make_trainer, train_arm, train_supervised
from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback

from grpo_engage.base.core import file_sha256
from grpo_engage.policy import sampling as policy
from grpo_engage.policy.sampling import load_policy, loading_settings
from grpo_engage.train.objective import Objective
from grpo_engage.train.stopping import RewardError
from grpo_engage.train.trainer import ReplyTrainer
from grpo_engage.train.watching import Watch, WatchReplies, parting, reporting, samples_page, watch_table

HYBRID = Objective(0.3, 0.5, 0.2)
FEW = dict(max_steps=4, learning_rate=1e-3, posts_per_step=2, num_generations=4, micro_batch_size=4, max_new_tokens=12,
           save_steps=2, kl_weight=0.02, cut_replies="keep")  # 12 tokens cut most; unfinished ones count here, as shown


class KillLogging(TrainerCallback):
    """Stops a run after the look of `step`, before its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def longer(posts, replies):
    return np.array([len(reply) / 200 for reply in replies])


def hybrid(base, pairs, folder, reward=brevity, **options):
    return train_arm(base, pairs, folder, objective=HYBRID, reward=reward, reward_id="brevity", **FEW | options)


@pytest.fixture(scope="module")
def watch(pairs):
    return Watch(posts=pairs["tweet"].unique()[:3].tolist(), proxy=brevity, judge=longer, every=3, replies=2,
                 max_new_tokens=12, seed=5)


@pytest.fixture(scope="module")
def watched(base, pairs, watch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return folder, hybrid(base, pairs, folder, watch=watch)


def test_watching_changes_nothing_that_is_trained(base, pairs, watched, tmp_path):
    hybrid(base, pairs, tmp_path)
    assert file_sha256(tmp_path / "adapter") == file_sha256(watched[0] / "adapter")
    assert (tmp_path / "train_log.csv").read_bytes() == (watched[0] / "train_log.csv").read_bytes()
    assert not (tmp_path / "samples.parquet").exists()


def test_looks_at_other_posts_are_not_set_side_by_side(base, pairs, watch, tmp_path, capsys):
    with pytest.raises(Killed):
        hybrid(base, pairs, tmp_path, watch=replace(watch, every=1), callbacks=[KillLogging(4)])
    assert pd.read_csv(tmp_path / "watch.csv")["step"].tolist() == [0, 1, 2, 3, 4]
    shutil.copytree(tmp_path, tmp_path / "rarer")
    hybrid(base, pairs, tmp_path / "rarer", watch=replace(watch, every=4))  # the same looks, fewer to come
    assert pd.read_csv(tmp_path / "rarer" / "watch.csv")["step"].tolist() == [0, 1, 2, 4]
    capsys.readouterr()
    hybrid(base, pairs, tmp_path, watch=replace(watch, every=1, posts=watch.posts[:2]))
    assert pd.read_csv(tmp_path / "watch.csv")["step"].tolist() == [2, 3, 4]
    assert "looks until step 2 were at other posts or scores" in capsys.readouterr().out
    assert set(pd.read_parquet(tmp_path / "samples.parquet")["tweet"]) == set(watch.posts[:2])


def test_what_was_watched_is_what_was_said(base, pairs, watch, watched):
    """Before the first step, every third one and after the last; the adapter's own replies, scored by both scores."""
    samples = pd.read_parquet(watched[0] / "samples.parquet")
    assert samples.groupby("step").size().to_dict() == {0: 6, 3: 6, 4: 6}
    assert np.allclose(samples["proxy"], brevity(samples["tweet"], samples["reply"]))
    assert np.allclose(samples["judge"], longer(samples["tweet"], samples["reply"]))
    loaded = policy.load_adapted(base, watched[0] / "adapter")
    seed = policy.child_seed(watch.seed, "watch")
    for step, model in ((0, load_policy(base)), (4, loaded)):
        said = policy.generate_replies(*model, watch.posts, 2, max_new_tokens=12, seed=seed)["text"]
        assert samples.loc[samples["step"] == step, "reply"].tolist() == said.tolist()
    table = pd.read_csv(watched[0] / "watch.csv")
    by_hand = samples[samples["step"] == 3].groupby("post")["judge"].mean()
    assert table.loc[1, "judge_reward"] == pytest.approx(by_hand.mean())
    assert table.loc[1, "judge_se"] == pytest.approx(by_hand.std(ddof=1) / np.sqrt(3))


def test_a_killed_run_has_each_look_once_and_reports_by_the_names_that_were_asked_for(base, pairs, watch, watched,
                                                                                        tmp_path):
    """Killed after a look that no checkpoint knows; TensorBoard's own reader finds each step once, too."""
    with pytest.raises(Killed):
        hybrid(base, pairs, tmp_path, watch=watch, report_to="tensorboard", callbacks=[KillLogging(3)])
    assert pd.read_csv(tmp_path / "watch.csv")["step"].tolist() == [0, 3]
    hybrid(base, pairs, tmp_path, watch=watch, report_to="tensorboard")
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("policy_loss", "avg_reward", "kl_penalty", "supervised_loss", "diversity", "entropy",
                 "frac_reward_zero_std", "completions/mean_length"):
        assert [event.step for event in found.Scalars(f"train/{name}")] == [1, 2, 3, 4], name
    for name in ("proxy_reward", "judge_reward"):
        assert [event.step for event in found.Scalars(f"train/{name}")] == [3, 4]
    table = pd.read_csv(tmp_path / "watch.csv").set_index("step")["judge_reward"]
    assert [event.value for event in found.Scalars("train/judge_reward")] == pytest.approx(table[[3, 4]].tolist())
    shutil.rmtree(tmp_path / "tensorboard")  # its files hold the time of day
    assert file_sha256(tmp_path) == file_sha256(watched[0])  # adapter, log, watch.csv, samples.parquet, samples.html


@pytest.mark.parametrize("objective", [Objective(0.0, 1.0, 0.0), Objective(1.0, 0.0, 0.3)])
def test_diversity_is_logged_whether_or_not_it_is_asked_for(base, pairs, tmp_path, objective):
    log = train_arm(base, pairs, tmp_path, objective=objective, reward=brevity if objective.beta else None,
                    **FEW | {"max_steps": 1, "kl_weight": 0.0})
    assert log["diversity"].between(0, 1).all()


def test_untrusted_texts_are_escaped_and_whole():
    samples = pd.DataFrame({"step": 0, "post": [0, 1], "sample": 0, "proxy": 0.5, "judge": 0.25,
                            "tweet": ["</td><img src=x onerror=alert(1)>", "b&"],
                            "reply": ["<script>alert('x')</script>" + "w" * 300, "=1+1"]})
    page = samples_page(samples, "<b>title</b>")
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "&lt;script&gt;alert('x')&lt;/script&gt;" + "w" * 300 in page and "b&amp;" in page and "0.250" in page


def test_parting_is_rarely_claimed_where_nothing_parts():
    """Eight looks at which nothing changes: both tests at 0.01 / 7 at once, so hardly ever."""
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"step": np.repeat(range(8), 12), "post": np.tile(range(12), 8)})
    claims = [bool(parting(frame.assign(proxy=rng.normal(size=96), judge=rng.normal(size=96)))) for _ in range(10)]
    assert sum(claims) == 0
    drifting = frame.assign(proxy=frame["step"] + rng.normal(size=96), judge=-frame["step"] + rng.normal(size=96))
    assert parting(drifting).startswith("since step 0")


def test_reward_up_while_judge_falls_is_said_once(base, pairs, tmp_path, capsys):
    looks = iter(range(9))
    now = {}

    def drift(sign):
        def score(posts, replies):
            if sign > 0:
                now["look"] = next(looks)
            noise = np.array([(hash_of * 37 % 11) / 1000 for hash_of in range(len(replies))])
            return 0.5 + sign * (0.05 + noise) * now["look"]
        return score

    watch = Watch(pairs["tweet"].unique()[:6].tolist(), proxy=drift(1), judge=drift(-1), every=1, replies=1,
                  max_new_tokens=6)
    train_supervised(base, pairs, tmp_path, max_steps=3, learning_rate=1e-3, batch_size=4, watch=watch)
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "training reward rose by" in said and "samples.html" in said


def test_bad_watching_is_refused(watch):
    for wrong in (replace(watch, every=0), replace(watch, posts=[]), replace(watch, replies=0)):
        with pytest.raises(ValueError, match="watching needs"):
            WatchReplies(None, wrong, "nowhere", "demo")
    assert watch_table(pd.DataFrame({"step": [0], "post": [0], "proxy": [0.1], "judge": [0.2], "n_tokens": [3],
                                     "finish_reason": ["stop"]}))["proxy_se"].isna().all()  # one post: no error, not 0


class Faulty:
    """A reward that raises on its n-th batch, for one reply of it; mended by `fault = None`."""

    def __init__(self, at):
        self.at, self.calls, self.fault = at, 0, None

    def __call__(self, posts, replies):
        self.calls += len(replies) > 1
        if self.calls == self.at and self.fault is None:
            self.fault = posts[1], replies[1]
        if self.fault and self.fault in zip(posts, replies, strict=True):
            raise ZeroDivisionError("no such thing")
        return brevity(posts, replies)


def test_a_run_goes_on_once_its_reward_is_mended(base, pairs, watch, watched, tmp_path):
    """It stops with post and reply, at a checkpoint of the last whole step; it ends with an undisturbed run's bytes."""
    reward = Faulty(4)
    with pytest.raises(RewardError, match="no such thing") as caught:
        hybrid(base, pairs, tmp_path, reward, watch=watch)
    assert all(repr(text[:200]) in str(caught.value) for text in reward.fault) and "step 4" in str(caught.value)
    assert (tmp_path / "checkpoints" / "checkpoint-3").exists()  # regular ones come every second step
    calls = []

    def mended(posts, replies):
        calls.append(len(replies))
        return brevity(posts, replies)

    hybrid(base, pairs, tmp_path, mended, watch=watch)
    assert len(calls) == 1  # nothing that was trained is trained again
    assert file_sha256(tmp_path) == file_sha256(watched[0])


@pytest.mark.parametrize(("looks", "step"), [(1, 3), (2, 4)])  # the last step is looked at though it is no third one
def test_a_watched_score_that_raises_stops_at_a_checkpoint_too(base, pairs, watch, watched, tmp_path, looks, step):
    def faulty(posts, replies):
        if len(looked) == looks:
            raise ZeroDivisionError("no judge")
        looked.append(1)
        return longer(posts, replies)

    looked = []
    with pytest.raises(RewardError, match=f"watched judge raised ZeroDivisionError: no judge .step {step}"):
        hybrid(base, pairs, tmp_path, watch=replace(watch, judge=faulty))
    assert (tmp_path / "checkpoints" / f"checkpoint-{step}").exists()
    hybrid(base, pairs, tmp_path, watch=watch)
    assert file_sha256(tmp_path) == file_sha256(watched[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_names_step_and_reference(base, pairs, tmp_path, what, monkeypatch):
    """One of the references gives a NaN (an infinite slope, for the gradient); it is found among its micro-batch."""
    trainer = make_trainer(base, pairs.head(8), tmp_path, objective=Objective(1.0, 0.0, 0.0), max_steps=1,
                           learning_rate=1e-3, batch_size=8, micro_batch_size=4)
    trainer.remove_callback(PrinterCallback)
    guilty = trainer.train_dataset["reference"][3]
    sound = ReplyTrainer._supervised_loss

    def spoilt(self, model, inputs):
        loss = sound(self, model, inputs)
        for ids, labels in zip(inputs["reference_ids"], inputs["reference_labels"], strict=True):
            if trainer._tokenizer.decode(ids[labels != -100], skip_special_tokens=True) == guilty:
                zero = 0 * next(p for p in model.parameters() if p.requires_grad).sum()
                loss = loss + (zero.sqrt() if what == "gradient" else zero / 0)
        return loss

    monkeypatch.setattr(ReplyTrainer, "_supervised_loss", spoilt)
    with pytest.raises(FloatingPointError, match=f"the {what} is not finite at step 1 ") as caught:
        trainer.train()
    assert f"reference {guilty!r}" in str(caught.value) and "first that gives it alone" in str(caught.value)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in weights)  # it stopped before the optimiser took the step


def test_a_nan_gradient_names_post_and_completion(base, pairs, tmp_path):
    trainer = make_trainer(base, pairs, tmp_path, objective=Objective(0.0, 1.0, 0.0), reward=brevity, max_steps=2,
                           learning_rate=1e-3, posts_per_step=2, num_generations=2, max_new_tokens=8)
    trainer.remove_callback(PrinterCallback)
    weight = next(p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in name)
    weight.register_hook(lambda grad: grad * float("nan") if trainer.state.global_step == 1 else grad)
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 2") as caught:
        trainer.train()
    said = [f"completion {text!r}" for text in list(trainer._logs["completion"])[-4:]]
    assert any(text in str(caught.value) for text in said) and "post '" in str(caught.value)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_report_without_its_package_says_so(package, tmp_path, base, pairs):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed: see the next test")
    with pytest.raises(ImportError, match=f"needs the package {package}.*pip install {package}"):
        train_supervised(base, pairs, tmp_path, max_steps=1, learning_rate=1e-3, report_to=package)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_report_with_its_package_stays_on_this_machine(package, tmp_path):
    """In a process of its own, since trackio reads its settings when it is imported."""
    pytest.importorskip(package)
    program = ("import sys\n"
               "from pathlib import Path\n"
               f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
               "from training import train_supervised\n"
               "from grpo_engage.policy.base_models import ensure_policy\n"
               "from grpo_engage.data.simulator import simulate_pairs\n"
               "pairs = simulate_pairs(30, seed=8)[['tweet', 'reply']]\n"
               "train_supervised(ensure_policy('nano'), pairs, Path(sys.argv[1]), max_steps=1, learning_rate=1e-3,\n"
               "                 batch_size=4, report_to=sys.argv[2])\n")
    unset = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "seed0"), package], check=True,
                   env=unset | {"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert list(tmp_path.glob("seed0/wandb/offline-run-*" if package == "wandb" else "trackio/grpo_engage*.db"))


def test_every_arm_and_seed_reports_under_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    names = [reporting("trackio", f"runs/{run}/train/{arm}/seed{seed}")[0]["run_name"]
             for run in "ab" for arm in ("baseline", "grpo") for seed in (0, 1)]
    assert names[:3] == ["a-train-baseline-seed0", "a-train-baseline-seed1", "a-train-grpo-seed0"]
    assert len(set(names)) == 8


def test_reports_are_settings():
    assert reporting("none", ".")[0]["report_to"] == "none"
    with pytest.raises(ValueError, match="none, tensorboard, wandb, trackio"):
        reporting("mlflow", ".")


def test_four_bits_and_fast_attention_say_what_they_need(base, monkeypatch):
    assert loading_settings() == {} and loading_settings(attention="sdpa") == {"attn_implementation": "sdpa"}
    monkeypatch.setattr(policy, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="4bit.*missing here: the package bitsandbytes.*, or quantization='none'"):
        load_policy(base, "4bit")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ValueError, match="flash_attention_2.*missing here: a CUDA GPU.*flash-attn.*attention='auto'"):
        load_policy(base, attention="flash_attention_2")


def test_on_a_gpu_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(policy, "device_and_dtype", lambda: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(policy, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(policy, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="missing here: the package bitsandbytes. `pip install bitsandbytes`"):
        loading_settings("4bit")
    with pytest.raises(ValueError, match="missing here: the package flash-attn. `pip install flash-attn`"):
        loading_settings(attention="flash_attention_2")


def test_four_bits_are_nf4_of_the_qlora_paper(monkeypatch):
    """The configuration as it would be on a GPU with bitsandbytes; neither is needed to build it."""
    monkeypatch.setattr(policy, "device_and_dtype", lambda: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(policy, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(policy, "is_flash_attn_2_available", lambda: True)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: "0.46.0" if name == "bitsandbytes" else version(name))
    settings = loading_settings("4bit", "flash_attention_2")
    config = settings["quantization_config"]
    assert isinstance(config, BitsAndBytesConfig) and config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and config.bnb_4bit_use_double_quant
    assert settings["attn_implementation"] == "flash_attention_2" and settings["device_map"] == {"": 0}


def test_attention_implementations_agree(base, pairs):
    few = pairs.head(4)
    losses = []
    for attention in ("eager", "sdpa"):
        model, tokenizer = load_policy(base, attention=attention)
        assert model.config._attn_implementation == attention
        losses.append(policy.reply_nll(model, tokenizer, few["tweet"].tolist(), few["reply"].tolist())["nll"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
