"""One's own reward from a setting to weights, watch, evaluation and tables, in one process and in several."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from grpo_engage.base.core import read_json, write_json
from grpo_engage.evaluation.robustness import gate_notes
from grpo_engage.evaluation.scoring import arms_reward, engagement_scorers
from grpo_engage.policy.sampling import format_prompt, load_policy
from grpo_engage.rewards.best_of_n import best_of_n_stage
from grpo_engage.rewards.training_reward import UnvalidatedReward, training_reward
from grpo_engage.run.graph import made_from, outside_files, refuse_missing_files
from grpo_engage.run.settings import load_preset, resolve_config
from grpo_engage.train.hybrid import train_stage
from grpo_engage.train.objective import Objective
from grpo_engage.train.stopping import RewardError
from grpo_engage.train.trainer import ReplyTrainer

MINE = """
def asks_back(completions, post, **_):
    return [100 * ("?" in reply) - len(reply.split()) for reply in completions]

def breaks(completions, post):
    return [None if len(reply) > 5 else 1.0 for reply in completions]

def breaks_late(completions, post):
    return [1.0 if len(completions) > 20 else None for _ in completions]  # the gate asks about more at once
"""
TINY = dict(arm="grpo", warm_start="base", max_steps=2, posts_per_step=2, num_generations=4, max_new_tokens=40,
            report_to="none", watch_every=1, watch_posts=2, watch_replies=2, validation_replies=4,
            gradient_accumulation=0, allow_unvalidated_reward=True, cut_replies="keep")


@pytest.fixture
def world(small_world, tmp_path):
    """A run up to training, and `mine 🎩.py` outside it."""
    shutil.copytree(small_world, tmp_path / "run")
    (tmp_path / "mine 🎩.py").write_text(MINE, encoding="utf-8")
    return tmp_path / "run"


def own(world, name="asks_back"):
    return f"{world.parent / 'mine 🎩.py'}:{name}"


def test_an_arm_trains_by_it_and_the_evaluation_scores_by_it(world, monkeypatch):
    monkeypatch.chdir(world.parent)  # the setting is relative to where it is given
    log = train_stage(world, reward=["learned", "mine 🎩.py:asks_back*0.5"], **TINY)
    monkeypatch.chdir("/")
    folder = world / "train" / "grpo" / "seed0"
    manifest = read_json(folder / "manifest.json")
    assert log["reward"].abs().max() > 1 and manifest["reward_validated"] is False
    assert manifest["own_reward"]["name"] == "learned + 0.5 mine 🎩.py:asks_back"
    assert manifest["own_reward"]["spread"].keys() == {"learned", "mine 🎩.py:asks_back"}
    texts = ["Rain again ☔"] * 2, ["why?", "so it is"]
    scores, name = arms_reward(world, [("grpo", 0)])
    learned = training_reward(world, reward="learned")[0](*texts)
    np.testing.assert_allclose(scores(*texts), learned + 0.5 * np.array([99, -3]))
    assert name == manifest["reward"]
    raw, compare = engagement_scorers(world, "model", None, [("grpo", 0)])[1]["reward"]
    assert compare(raw(*texts), [[0.0], [0.0]]).tolist() == [1.0, 0.0]
    (note,) = gate_notes(world, "gold", [("grpo", 0)])
    assert note.startswith("the reward learned + 0.5 mine 🎩.py:asks_back did not pass its gate, ")
    samples = pd.read_parquet(folder / "samples.parquet")
    np.testing.assert_allclose(samples["proxy"], scores(samples["tweet"].tolist(), samples["reply"].tolist()))


def test_best_of_n_shows_what_it_would_choose(world):
    peaks = best_of_n_stage(world, best_of_n_posts=3, best_of_n_replies=4, own_reward=own(world))
    name = "mine 🎩.py:asks_back"
    assert set(peaks.loc[peaks["proxy"] == name, "target"]) == set(peaks["target"])
    manifest = read_json(world / "best_of_n" / "manifest.json")
    assert "asks_back" in manifest["own_reward"]
    table = pd.read_csv(world / "best_of_n" / "curves.csv")
    own_rows = table[(table["proxy"] == name) & (table["target"] == "proxy")].sort_values("n")["value"].to_numpy()
    assert (np.diff(own_rows) >= -1e-12).all() and own_rows[-1] > own_rows[0]  # the best of more is no worse
    config = config_of(f"own_reward={own(world)}")
    assert list(outside_files(config, "best_of_n").values()) == [world.parent / "mine 🎩.py"]
    assert made_from(world, config, "best_of_n", "", None)["parameters"]["own_reward"] == name
    with pytest.raises(ValueError, match="did you mean 'asks_back'"):
        refuse_missing_files(config_of(f"own_reward={own(world, 'ask_back')}"))


@pytest.mark.slow  # two processes start twice: half a minute
def test_two_processes_load_it_themselves_and_say_the_same(world):
    given = TINY | {"reward": own(world)}
    logs = [train_stage(world, **given, n_processes=n) for n in (1, 2)]
    assert len(logs[1]) == 2 and logs[1]["reward"].abs().max() > 1
    assert read_json(world / "train/grpo/seed0/manifest.json")["own_reward"]["identifier"].startswith("mine 🎩.py:asks")
    with pytest.raises(RuntimeError, match=r"(?s)reward 'breaks_late' in .*mine 🎩.py' gave 'None', which is no "
                                           r"finite number, for post '.*', reply '.* \(step 1\)"):
        train_stage(world, **given | {"reward": own(world, "breaks_late"), "n_processes": 2, "watch_every": 0})


def test_what_breaks_is_named_with_post_reply_and_step(world):
    with pytest.raises(RewardError, match=r"'breaks_late' in .*gave 'None', .* for post '.*', reply '.*' \(step 1\)"):
        train_stage(world, **TINY | {"reward": own(world, "breaks_late"), "watch_every": 0})
    # the gate asks before, about real replies
    with pytest.raises(ValueError, match=r"'breaks' in .*gave 'None', .* for post '.*', reply '.*'"):
        train_stage(world, **TINY | {"reward": own(world, "breaks"), "watch_every": 0})


def test_a_refused_reward_trains_nothing_unless_it_is_said(world):
    with pytest.raises(UnvalidatedReward, match=r"mine 🎩.py:asks_back did not pass its gate, .*override with"):
        train_stage(world, **TINY | {"reward": own(world), "allow_unvalidated_reward": False})
    assert len([*(world / "own_rewards").iterdir()]) == 1  # asked for once
    assert not (world / "train/grpo/seed0/adapter").exists()


def test_a_learned_part_that_was_refused_refuses_the_sum(world):
    path = world / "reward_model" / "validation.json"
    verdicts = read_json(path)["verdicts"]
    verdicts["reward"] |= {"validated": False, "verdict": "refused", "text": "refused: adds nothing"}
    write_json(path, {"verdicts": verdicts})
    with pytest.raises(UnvalidatedReward, match="the learned reward did not pass its gate, refused"):
        training_reward(world, reward=["learned", own(world)])
    assert training_reward(world, reward=["learned", own(world)], allow_unvalidated_reward=True)[2] is False


def test_a_classifier_trains_and_has_its_weights_in_the_identifier(world, make_classifier, tmp_path):
    folder = make_classifier(tmp_path / "clf", ["no", "yes"])
    log = train_stage(world, **TINY | {"reward": str(folder)})
    assert log["reward"].notna().all() and log["reward_std"].max() > 0
    first = training_reward(world, reward=str(folder), allow_unvalidated_reward=True)[1]
    make_classifier(folder, ["no", "yes"], seed=1)
    assert training_reward(world, reward=str(folder), allow_unvalidated_reward=True)[1] != first
    many = make_classifier(tmp_path / "many", ["sad", "glad", "calm"])
    with pytest.raises(ValueError, match="say which of them pays, .*#label=sad"):
        training_reward(world, reward=str(many))
    its_name = training_reward(world, reward=f"{many}#label=glad", allow_unvalidated_reward=True)[1]
    assert its_name.startswith("many#label=glad ")


def test_a_function_that_reads_references_gets_those_of_its_post_and_is_not_validated(world):
    (world.parent / "mine 🎩.py").write_text("def near(completions, post, reference):\n"
                                             "    return [len(of) for of in reference]\n", encoding="utf-8")
    pairs = pd.read_parquet(world / "data" / "pairs.parquet")
    reward, _, passed = training_reward(world, reward=own(world, "near"), allow_unvalidated_reward=True)
    post = pairs["tweet"].iloc[0]
    assert reward([post, "never seen"], ["a", "a"]).tolist() == [(pairs["tweet"] == post).sum(), 0] and passed is False


def config_of(*texts):
    return resolve_config(load_preset("smoke"), list(texts)) | {"preset": "smoke"}


def test_editing_the_file_redoes_its_arm_and_moving_it_does_not(world, tmp_path):
    job = ("train", "grpo", 0)
    config = config_of(f"train.grpo.reward={own(world)}*0.5")
    before = made_from(world, config, *job)
    assert before["parameters"]["reward"] == "0.5 mine 🎩.py:asks_back" and own(world) not in json.dumps(before)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(world.parent / "mine 🎩.py", tmp_path / "elsewhere")
    assert made_from(world, config_of(f"train.grpo.reward={moved}:asks_back*0.5"), *job) == before
    for changed in ("*0.4", ""):
        other = made_from(world, config_of(f"train.grpo.reward={own(world)}{changed}"), *job)
        assert other["parameters"]["reward"] != before["parameters"]["reward"]
    (world.parent / "mine 🎩.py").write_text(MINE + "\nx = 1\n", encoding="utf-8")
    after = made_from(world, config, *job)
    assert after["outside"] != before["outside"] and after["parameters"] == before["parameters"]
    assert outside_files(config, "train", "baseline") == {}


@pytest.mark.parametrize(("reward", "message"), [
    ("{}/no.py:f", "there is no such file"), ("{}/mine 🎩.py:ask_back", "did you mean 'asks_back'"),
    ("{}/no such folder", "there is no such file")])
def test_a_wrong_name_is_told_before_anything_runs(world, reward, message):
    with pytest.raises(ValueError, match=message):
        refuse_missing_files(config_of(f"train.grpo.reward={reward.format(world.parent)}"))


def test_a_preset_may_give_a_list_or_a_mapping(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: smoke\narms: [baseline, a, b]\ntrain:\n"
                                        "  a: {like: grpo, reward: [learned, '/x/mine.py:f*0.3']}\n"
                                        "  b: {like: grpo, reward: {learned: 1, '/x/mine.py:f': 0.3}}\n")
    train = resolve_config(load_preset(str(tmp_path / "mine.yaml")))["stages"]["train"]
    assert train["a"]["reward"] == train["b"]["reward"] == '["learned", "/x/mine.py:f*0.3"]'
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "check", "--preset", str(tmp_path / "mine.yaml")],
                          capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode and "there is no such file" in done.stderr + done.stdout


# --- conversations, with every objective

OBJECTIVES = {"baseline": (Objective(1, 0, 0), {}), "polychromic": (Objective(1, 0, 0.3), {}),
              "grpo": (Objective(0, 1, 0), {}), "hybrid": (Objective(0.3, 0.5, 0.2), {}),
              "product": (Objective(0, 1, 0), {"diversity_form": "product"}),
              "max_at_k": (Objective(0, 1, 0), {"advantage": "max_at_k", "max_k": 2})}


def asks_back(completions, post, **_):
    texts = [reply if isinstance(reply, str) else reply[-1]["content"] for reply in completions]
    return [float("?" in text) - 0.01 * len(text) for text in texts]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_conversations_train_as_the_texts_of_the_same_tokens(base, pairs, tmp_path, name):
    objective, more = OBJECTIVES[name]
    weights, rewards = {}, {}
    for form in ("text", "conversation"):
        model, tokenizer = load_policy(base)
        posts, replies = pairs["tweet"].tolist()[:8], pairs["reply"].tolist()[:8]
        talks = [[{"role": "user", "content": post}] for post in posts]
        # the text that the conversation becomes: the same tokens
        texts = [tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for talk in talks]
        assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == [
            tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for talk in talks]
        rows = {"prompt": texts if form == "text" else talks, "post": posts, "reference": replies}
        args = GRPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4, seed=3,
                          max_completion_length=16, learning_rate=1e-2, logging_steps=1, bf16=False, use_cpu=True,
                          report_to="none", gradient_checkpointing=False)
        lora = LoraConfig(target_modules="all-linear", init_lora_weights=True)
        torch.manual_seed(0)
        trainer = ReplyTrainer(model, asks_back, args, Dataset.from_dict(rows), objective=objective, **more,
                               processing_class=tokenizer, peft_config=lora)
        trainer.train()
        weights[form] = torch.cat([w.detach().flatten() for w in trainer.model.parameters() if w.requires_grad])
        rewards[form] = [entry.get("reward") for entry in trainer.state.log_history if "loss" in entry]
    assert torch.equal(weights["text"], weights["conversation"]) and rewards["text"] == rewards["conversation"]
    assert weights["text"].abs().max() > 0 and len(rewards["text"]) == 2
    assert (rewards["text"][0] is not None) == bool(objective.beta)
    assert format_prompt(posts[0], tokenizer)  # what the pipeline asks with is a text too
