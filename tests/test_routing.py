"""The right adapter, split, seed, post and reference reach each place; every wrong one would give numbers too."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from training import make_grpo_trainer, train_arm, train_grpo
from transformers import PrinterCallback, TrainerCallback

from grpo_engage.base.core import child_seed, write_csv, write_json, write_parquet
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.evaluation import generation
from grpo_engage.evaluation.generation import Job, engineered_prompt, generate_part, generate_parts
from grpo_engage.evaluation.settings import EvaluationSampling
from grpo_engage.policy.sampling import format_prompt, generate_replies, load_adapted, load_policy, reply_nll
from grpo_engage.policy.settings import INSTRUCTION
from grpo_engage.rewards import best_of_n, reward_model
from grpo_engage.run.graph import job_parameters, jobs
from grpo_engage.run.settings import load_preset, resolve_config
from grpo_engage.train import arm_training, hybrid
from grpo_engage.train.arm_training import trl_reward
from grpo_engage.train.loop import lora_config, save_adapter
from grpo_engage.train.objective import Objective
from grpo_engage.train.watching import watched_posts

SPLITS = ("policy", "reward", "judge", "validation", "test")


class Caught(Exception):
    pass


def an_adapter(base, folder, seed):
    """A LoRA adapter with weights drawn at random, so large that the policy says other things."""
    model = get_peft_model(load_policy(base)[0], lora_config(4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save_adapter(model, folder, "nano")


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory):
    """A run with all five splits, every second reply a reference, and adapters of two seeds."""
    folder = tmp_path_factory.mktemp("run")
    pairs = simulate_pairs(60, seed=4).reset_index(drop=True)
    names = {name: number for number, name in enumerate(pairs["conversation_id"].unique())}
    pairs = pairs.assign(row=pairs.index, split=[SPLITS[names[name] % 5] for name in pairs["conversation_id"]])
    write_parquet(folder / "data" / "pairs.parquet", pairs)
    write_parquet(folder / "reward_model" / "labels.parquet",
                  pd.DataFrame({"row": pairs["row"], "reference": pairs["row"] % 2 == 0}))
    write_json(folder / "policy" / "policy.json", {"name": "nano", "sha256": None, "quantization": "none"})
    for seed in (0, 1):
        an_adapter(base, folder / "train" / "baseline" / f"seed{seed}" / "adapter", seed)
    return folder


# ---- evaluation


TWEETS, SAMPLING = ["storm on elm street?", "a new bridge 🌉, finally."], dict(n_samples=16, max_new_tokens=8)


def made_by(run_dir, job):
    posts = pd.DataFrame({"post": ["a", "b"], "tweet": TWEETS, "replies": [["x", "y"]] * 2})
    return generate_part(run_dir, job, posts, EvaluationSampling.make(**SAMPLING), 7)[0]


def test_each_arm_and_seed_replies_with_its_own_adapter(run_dir, base):
    said = []
    for seed, adapter in ((0, "baseline"), (1, "baseline"), (0, "")):
        found = made_by(run_dir, Job("an arm", "trained", seed, "test", adapter))
        model = load_adapted(base, run_dir / "train" / "baseline" / f"seed{seed}" / "adapter") if adapter else (
            load_policy(base))
        by_hand = generate_replies(*model, TWEETS, seed=child_seed(7, "generation", "test", seed), label="",
                                   **EvaluationSampling.make(**SAMPLING).options())
        assert found["text"].tolist() == by_hand["text"].tolist()
        assert found["post"].tolist() == ["a"] * 16 + ["b"] * 16
        said.append(tuple(found["text"]))
    assert len(set(said)) == 3


def test_two_processes_that_sample_give_what_one_gives(run_dir, monkeypatch):
    """Their pieces come back in order, each from its own adapter, whatever the number of cores."""
    jobs = [Job("an arm", "trained", seed, split, adapter) for split in ("test", "validation")
            for seed, adapter in ((0, "baseline"), (1, "baseline"), (0, ""))]
    posts = pd.DataFrame({"post": ["a", "b"], "tweet": TWEETS, "replies": [["x", "y"]] * 2})
    found = {}
    for cores in (1, 2):
        monkeypatch.setattr(generation, "usable_cores", lambda cores=cores: cores)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        made = generate_parts(run_dir, jobs, {"test": posts, "validation": posts}, EvaluationSampling.make(**SAMPLING),
                              8, threads=1)
        torch.set_num_threads(before)
        found[cores] = [frame for frame, _, _ in made]
        shutil.rmtree(run_dir / "evaluation" / "parts")
    for one, two in zip(found[1], found[2], strict=True):
        pd.testing.assert_frame_equal(one, two)
    assert len({tuple(frame["text"]) for frame in found[2]}) == 6


def test_arms_share_their_draws_and_seeds_do_not(run_dir):
    first, other_seed, other_arm = (made_by(run_dir, Job(arm, "base", seed, "test"))["text"].tolist()
                                    for arm, seed in (("base", 0), ("base", 1), ("another", 0)))
    assert first == other_arm and first != other_seed


def test_a_prompt_shows_references_of_the_policy_split_alone(run_dir):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    shown = engineered_prompt(run_dir, seed=1, n_examples=10**6)
    expected = pairs[(pairs["split"] == "policy") & (pairs["row"] % 2 == 0)].drop_duplicates("conversation_id")
    assert shown.count("\nReply: ") == len(expected) > 5
    assert all(f"Post: {tweet[:200]}" in shown for tweet in expected["tweet"])
    kept = set(pairs.loc[pairs["split"] == "policy", "tweet"])
    assert not any(f"Post: {tweet}" in shown for tweet in set(pairs["tweet"]) - kept)


# ---- what an arm trains on, from and with


@pytest.fixture
def stage(run_dir, monkeypatch):
    """`train_stage` up to training: its arguments, and the held-out replies."""
    heldout = []
    monkeypatch.setattr(hybrid, "heldout_nll", lambda *given: heldout.append(given[3]) or 1.0)

    def catch(base, examples, folder, settings, **others):
        raise Caught({"examples": examples, "heldout": heldout[-1], **others})

    monkeypatch.setattr(hybrid, "train_arm", catch)

    def call(**settings):
        with pytest.raises(Caught) as caught:
            hybrid.train_stage(run_dir, reward="heuristic", report_to="none", watch_every=0, **settings)
        return caught.value.args[0]

    return call


@pytest.mark.parametrize("arm", ["baseline", "polychromic", "grpo", "hybrid"])
def test_an_arm_sees_the_policy_split_and_is_held_against_validation(stage, run_dir, arm):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet").set_index("row")
    given = stage(arm=arm, validation_replies=10**4)
    assert (pairs.loc[given["examples"]["row"], "split"] == "policy").all()
    if arm != "grpo":  # which imitates nobody: all posts are its
        assert set(given["examples"]["row"]) == set(pairs.index[(pairs["split"] == "policy") & (pairs.index % 2 == 0)])
    assert set(given["heldout"]["row"]) == set(pairs.index[(pairs["split"] == "validation") & (pairs.index % 2 == 0)])


def test_the_posts_that_are_watched_are_validation_posts(run_dir):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    assert set(watched_posts(pairs, 10**4)) == set(pairs.loc[pairs["split"] == "validation", "tweet"])


def test_every_arm_and_seed_draws_from_a_stream_of_its_own(stage):
    seeds = [stage(arm=arm, seed=seed)["seed"] for arm in ("baseline", "polychromic", "grpo", "hybrid")
             for seed in (0, 1)]
    assert len(set(seeds)) == 8


def test_each_job_of_a_run_gets_its_arm_and_seed():
    config = resolve_config(load_preset("smoke") | {"n_seeds": 2, "seed": 3}) | {"preset": "smoke"}
    trained = [job for job in jobs(config) if job[0] == "train"]
    assert trained == [("train", arm, seed) for arm in config["arms"] for seed in config["seeds"]]
    for job in trained:
        given = job_parameters(config, *job)
        assert (given["arm"], given["seed"]) == job[1:]
    assert job_parameters(config, "evaluation")["seeds"] == config["seeds"] and len(set(config["seeds"])) == 2


def test_heldout_loss_is_that_of_the_adapter(run_dir, base):
    replies = pd.read_parquet(run_dir / "data" / "pairs.parquet").head(6)
    adapter = run_dir / "train" / "baseline" / "seed1" / "adapter"
    for place, model in ((adapter, load_adapted(base, adapter)), (None, load_policy(base))):
        table = reply_nll(*model, replies["tweet"].tolist(), replies["reply"].tolist())
        found = hybrid.heldout_nll(base, place, {}, replies, INSTRUCTION)
        assert found == pytest.approx(table["nll"].sum() / table["n_tokens"].sum())
    assert hybrid.heldout_nll(base, None, {}, replies, INSTRUCTION) != pytest.approx(
        hybrid.heldout_nll(base, adapter, {}, replies, INSTRUCTION), rel=0.01)


def test_what_is_saved_is_what_was_trained_and_not_its_frozen_copy(run_dir, base, pairs, tmp_path):
    """With a KL term there are two adapters in the model."""
    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **_):
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    train_grpo(base, pairs["tweet"], lambda posts, replies: np.arange(len(replies), dtype=float), tmp_path,
               warm_start=run_dir / "train" / "baseline" / "seed0" / "adapter", max_steps=1, learning_rate=1e-2,
               posts_per_step=2, num_generations=2, max_new_tokens=4, callbacks=[kept := Keep()], cut_replies="keep")
    saved, now = load_adapted(base, tmp_path / "adapter")[0].state_dict(), kept.weights
    names = [name for name in saved if ".default." in name]
    assert names and all(torch.equal(saved[name], now[name]) for name in names)
    assert not all(torch.equal(now[name], now[name.replace(".default.", ".ref.")]) for name in names)


# ---- rewards


def test_each_reply_is_rewarded_under_its_post_and_as_it_would_be_shown():
    asked = []

    def reward(posts, replies):
        asked.extend(zip(posts, replies, strict=True))
        return np.array([0.25, 0.5, 0.75])

    given = {"completions": ["yes\n<|im_end|>", "  no ", "👍"], "post": ["p1", "p2", "p3"]}
    assert trl_reward(reward)(**given) == [0.25, 0.5, 0.75]
    assert asked == [("p1", "yes"), ("p2", "no"), ("p3", "👍")]
    assert trl_reward(reward, reward_pass_threshold=0.5)(**given) == [0.0, 1.0, 1.0]  # the mark itself passes


def test_in_training_too_the_post_is_the_one_of_the_prompt(base, pairs, tmp_path):
    asked = []

    def reward(posts, replies):
        asked.extend(posts)
        return np.zeros(len(replies))

    trainer = make_grpo_trainer(base, pairs["tweet"], reward, tmp_path, max_steps=1, learning_rate=1e-3,
                                posts_per_step=3, num_generations=2, max_new_tokens=4)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tokenizer = load_policy(base)[1]
    assert [format_prompt(post, tokenizer) for post in asked] == list(trainer._logs["prompt"])
    assert len(set(asked)) == 3 and asked[::2] == asked[1::2]


def test_a_checkpoint_belongs_to_everything_that_decides_the_result(base, pairs, tmp_path, monkeypatch):
    """The fingerprint under which `train_arm` looks for checkpoints, with one thing changed at a time."""
    def catch(folder, facts):
        raise Caught(facts)

    monkeypatch.setattr(arm_training, "prepare_checkpoints", catch)
    start = tmp_path / "start"
    start.mkdir()

    def fingerprint(weights=b"one", examples=None, **changes):
        (start / "adapter_model.safetensors").write_bytes(weights)
        options = dict(objective=Objective(0.3, 0.5, 0.2), reward_id="first", warm_start=start, seed=0) | changes
        with pytest.raises(Caught) as caught:
            train_arm(base, pairs.head(8) if examples is None else examples, tmp_path / "run", **options)
        return json.dumps(caught.value.args[0], sort_keys=True)

    other = pairs.head(8).assign(reply=[*pairs["reply"].head(7), "another last reply"])
    found = [fingerprint(), fingerprint(b"two"), fingerprint(examples=other), fingerprint(reward_id="second"),
             fingerprint(warm_start=None), fingerprint(seed=1), fingerprint(objective=Objective(0.3, 0.5, 0.1)),
             fingerprint(instruction="Answer in rhyme."), fingerprint(temperature=0.5), fingerprint(kl_weight=0.25)]
    assert len(set(found)) == len(found) and fingerprint() == found[0]


# ---- the reward models


def test_each_model_learns_from_its_own_split(run_dir, tmp_path, monkeypatch):
    seen = {}

    class Model:
        facts = {"n_pairs": 1, "n_posts": 1, "held_out_loss": 1.0, "best_epoch": 1.0}

        def __init__(self, backbone, **_):
            self.backbone = backbone

        def fit(self, pairs, labels, seed):
            seen[self.backbone] = set(pairs["split"]), seed
            if len(seen) == 2:
                raise Caught

        def save(self, folder):
            write_json(folder / "config.json", {})

    monkeypatch.setattr(reward_model, "EngagementRewardModel", Model)
    write_parquet(tmp_path / "data" / "pairs.parquet", pd.read_parquet(run_dir / "data" / "pairs.parquet"))
    write_json(tmp_path / "heuristic_reward" / "scores.parquet", "not read before the models are trained")
    with pytest.raises(Caught):
        reward_model.reward_model_stage(tmp_path, reward_backbone="hashing", judge_backbone="minilm")
    assert seen["hashing"][0] == {"reward"} and seen["minilm"][0] == {"judge"}
    assert seen["hashing"][1] != seen["minilm"][1]


def test_what_the_reward_is_compared_with_has_not_seen_validation_either(run_dir, tmp_path, monkeypatch):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    labels, seen = reward_model._label(pairs, 1.0, 0.5)[0], []

    class Context:
        def fit(self, rows, logits, counts, seed, names):
            seen.append(set(rows["split"]))
            return self

        def predict(self, rows, logits):
            return np.ones(len(rows))

    class Reward:
        def logits(self, posts, replies):
            return np.zeros(len(posts))

    monkeypatch.setattr(reward_model, "ContextModel", Context)
    held = pairs[pairs["split"] == "validation"]
    reward_model._in_context(tmp_path, pairs, held, np.arange(len(held)), labels, Reward(), 1.0, 0)
    assert seen == [{"policy", "judge"}] * 2


def test_best_of_n_is_tried_on_validation_posts(run_dir, tmp_path, monkeypatch):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    write_parquet(tmp_path / "data" / "pairs.parquet", pairs)
    write_json(tmp_path / "reward_model" / "validation.json", {})
    write_json(tmp_path / "policy" / "policy.json", {"name": "nano", "sha256": None, "quantization": "none"})

    def catch(model, tokenizer, posts, **_):
        raise Caught(posts)

    monkeypatch.setattr(best_of_n, "generate_replies", catch)
    with pytest.raises(Caught) as caught:
        best_of_n.best_of_n_stage(tmp_path, best_of_n_posts=10**4)
    assert set(caught.value.args[0]) == set(pairs.loc[pairs["split"] == "validation", "tweet"])


def test_likes_of_validation_and_test_move_no_label_of_the_others(run_dir):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    before = reward_model._label(pairs, 1.0, 0.5)[0]
    held = pairs["split"].isin(["validation", "test"])
    changed = pairs.assign(reply_likes=pairs["reply_likes"].where(~held, 1000 - pairs["row"]))
    after = reward_model._label(changed, 1.0, 0.5)[0]
    pd.testing.assert_frame_equal(before[~held], after[~held])
    assert not before[held].equals(after[held])


def test_an_echo_is_no_reference_however_liked(run_dir):
    pairs = pd.read_parquet(run_dir / "data" / "pairs.parquet")
    liked = pairs.index[(pairs["split"] == "policy")][3]
    pairs.loc[liked, ["reply_likes"]] = 500
    assert reward_model._label(pairs, 1.0, 0.5)[0].loc[liked, "reference"]
    pairs.loc[liked, "reply"] = pairs.loc[liked, "tweet"]
    assert not reward_model._label(pairs, 1.0, 0.5)[0].loc[liked, "reference"]


# ---- files


def test_text_in_a_csv_is_no_formula(tmp_path):
    frame = pd.DataFrame({"text": ["=1+1", "+cmd", "-2", "@x", "\tTab", "plain 👍"], "number": [-1.0] * 6})
    write_csv(tmp_path / "a.csv", frame)
    read = pd.read_csv(tmp_path / "a.csv")
    assert read["text"].tolist() == ["'=1+1", "'+cmd", "'-2", "'@x", "'\tTab", "plain 👍"]
    assert read["number"].tolist() == [-1.0] * 6
