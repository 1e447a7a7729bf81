"""What tests share: the smallest policy, a few simulated posts, the scripts that the README shows."""

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import REPO_ROOT, SPLITS, write_json, write_parquet
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.rewards.engagement_model import EngagementRewardModel

LONGEST = ("test_run.py", "test_run_errors.py", "test_graph.py", "test_processes.py", "test_settings.py")


def pytest_collection_modifyitems(items):
    """The longest files first: a file goes to one process, and the last one must not keep the other waiting."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def base():
    return ensure_policy("nano")


@pytest.fixture(scope="module")
def pairs():
    return simulate_pairs(30, seed=8)[["tweet", "reply"]]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A run up to training: 100 simulated conversations, a fifth in each split, and the smallest reward and judge."""
    folder = tmp_path_factory.mktemp("world")
    pairs = simulate_pairs(100, seed=4).reset_index(drop=True)
    place = pd.factorize(pairs["conversation_id"])[0]
    pairs = pairs.assign(row=pairs.index, split=np.array(SPLITS)[place % 5])
    write_parquet(folder / "data" / "pairs.parquet", pairs)
    write_parquet(folder / "reward_model" / "labels.parquet", pd.DataFrame({"row": pairs["row"], "reference": True}))
    for name, evidence in (("reward", "text"), ("judge", "length")):
        model = EngagementRewardModel(hidden_size=0, epochs=1, members=1, evidence=evidence)
        model.fit(own := pairs[pairs["split"] == name], np.log1p(own["reply_likes"].to_numpy()))
        model.save(folder / "reward_model" / name)
    verdict = {"verdict": "validated", "validated": True, "text": "validated", **dict.fromkeys(
        ("gain", "ci_low", "ci_high"), 0.1)}
    write_json(folder / "reward_model" / "validation.json", {"verdicts": {"reward": verdict, "judge": verdict}})
    write_json(folder / "policy" / "policy.json", {"name": "nano", "sha256": None, "quantization": "none"})
    return folder


@pytest.fixture(scope="session")
def readme_scripts():
    """The README's three: own reward and data; the learned reward in stock TRL; a trained adapter without us."""
    readme = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(scripts) == 3
    return scripts


@pytest.fixture(scope="session")
def run_script():
    """Runs a script as printed, in `folder`, then `checks`, which see its names in `of`; returns what it printed."""

    def run(script, folder, checks):
        (folder / "script.py").write_text(script, encoding="utf-8")
        program = f"import runpy\nof = runpy.run_path('script.py', run_name='__main__')\n{checks}"
        paths = [str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=600,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def make_classifier():
    """Saves a text classifier of random weights, seen nowhere before, as `folder`, and returns it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        AutoModelForSequenceClassification,
        BertConfig,
        GPT2Config,
        PreTrainedTokenizerFast,
        set_seed,
    )

    def make(folder, labels, problem_type="single_label_classification", kind="bert", seed=0):
        set_seed(seed)
        byte_level = ByteLevelBPETokenizer()
        byte_level.train_from_iterator(["you idiot"], vocab_size=260, special_tokens=["<end>"], show_progress=False)
        names = {"pad_token": "<end>"} if kind == "bert" else {"eos_token": "<end>"}
        PreTrainedTokenizerFast(tokenizer_object=byte_level._tokenizer, **names).save_pretrained(folder)
        facts = {"vocab_size": 260, "problem_type": problem_type, "id2label": dict(enumerate(labels)),
                 "label2id": {name: place for place, name in enumerate(labels)}, "initializer_range": 0.7}
        config = (BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                             max_position_embeddings=40, **facts) if kind == "bert" else
                  GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **facts))
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return folder

    return make
