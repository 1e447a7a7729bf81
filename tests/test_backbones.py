"""Rewards that read by any sentence encoder or by a causal language model: trained, saved, loaded, refused."""

import shutil

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import read_json
from grpo_engage.data import pairs as data
from grpo_engage.rewards import heuristic as heuristic_reward
from grpo_engage.rewards.engagement_model import EngagementRewardModel
from grpo_engage.rewards.reward_model import reward_model_stage
from grpo_engage.rewards.settings import RewardModelSettings
from grpo_engage.text.embedding import minilm_folder

POSTS = ["The bridge is closed tonight 🌉", "¿Por qué llueve en mayo?", "वोट आज है!", "Trains are late, again…"] * 3
REPLIES = ["Who says so?", "no", "It is what it is 🙃"]
TABLE = pd.DataFrame([{"conversation_id": str(place), "tweet": post, "reply": reply}
                      for place, post in enumerate(POSTS) for reply in REPLIES])
LABELS = pd.DataFrame({"residual": [2.0, 0.0, 0.5] * len(POSTS), "engagement": [6.0, 1.0, 2.0] * len(POSTS),
                       "expected": [1.0, 1.0, 1.0] * len(POSTS)})


@pytest.fixture
def encoder(tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), local_files_only=True)
    model.save(str(tmp_path / "encoder"))
    return tmp_path / "encoder"


@pytest.mark.parametrize("kind", ["sentence", "causal"])
def test_a_backbone_by_id_scores_the_same_when_loaded(kind, encoder, tmp_path):
    name, options = ((f"sentence:{encoder}", None) if kind == "sentence" else
                     ("causal:nano", {"max_steps": 3, "learning_rate": 5e-3}))
    model = EngagementRewardModel(name, epochs=2, backbone_options=options).fit(TABLE, LABELS, seed=1)
    model.save(tmp_path / "saved")
    loaded = EngagementRewardModel.load(tmp_path / "saved")
    found = model.logits(TABLE["tweet"], TABLE["reply"])
    assert np.ptp(found) > 0
    np.testing.assert_allclose(loaded.logits(TABLE["tweet"], TABLE["reply"]), found, atol=1e-4)


def test_other_weights_under_the_same_name_are_refused(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    EngagementRewardModel(f"sentence:{encoder}", epochs=1).fit(TABLE, LABELS).save(tmp_path / "saved")
    changed = SentenceTransformer(str(encoder), local_files_only=True)
    next(changed.parameters()).data[0, 0] += 1
    shutil.rmtree(encoder)
    changed.save(str(encoder))
    with pytest.raises(ValueError, match="train it again"):
        EngagementRewardModel.load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["sentence:", "causal:", "minilmm", "other:model"])
def test_unknown_backbones_are_refused_by_the_settings(name):
    with pytest.raises(ValueError, match="sentence:ID or causal:ID"):
        RewardModelSettings(reward_backbone=name).check()


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    data.data_stage(run_dir, source="simulator", n_conversations=60, seed=3)
    heuristic_reward.heuristic_reward_stage(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory):
    """Two narrow layers with random weights behind the real tokenizer: the stage reads thousands of texts."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=64)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    read = Transformer(str(folder / "bert"), max_seq_length=64)
    SentenceTransformer(modules=[read, Pooling(32)]).save(str(folder / "encoder"))
    return folder / "encoder"


@pytest.mark.parametrize("kind", ["sentence", pytest.param("causal", marks=pytest.mark.slow)])
def test_the_stage_trains_judges_and_gates_a_backbone_by_id(kind, small_encoder, two_stages):
    """The stage itself, with a folder as the id: validated by the same gate, and loaded by what comes after."""
    name = f"sentence:{small_encoder}" if kind == "sentence" else "causal:nano"
    found = reward_model_stage(two_stages, reward_backbone=name, judge_backbone="states", epochs=1, members=1)
    assert found["verdicts"]["reward"]["verdict"] in ("validated", "refused", "too little to tell")
    manifest = read_json(two_stages / "reward_model" / "manifest.json")
    assert manifest["parameters"]["reward_backbone"] == name and manifest["status"] == "completed"
    reward = EngagementRewardModel.load(two_stages / "reward_model" / "reward")
    assert reward.backbone.name == name and np.ptp(reward.logits(POSTS[:4], [*REPLIES, "yes"])) > 0
