"""Is `ReplyTrainer` a drop-in? TRL's own tests of GRPOTrainer, run with stock TRL and with ours in its place.

    python proofs/trl_tests.py TRL_CHECKOUT [--modes stock group leave_one_out max_at_k] [-k EXPRESSION]

TRL_CHECKOUT is a clone of TRL at a version near the installed one; nothing of it is kept here. Its tests load tiny
models and data from the Hub: this script makes a local cache of the text models (random weights, few tokens) and
prompts under the same names, so that the tests run without a network. What needs other models (images) fails with stock
too. Writes proofs/trl_tests.csv: a row for each test that stock passes or that differs; exit 1 where ours fails what
stock passes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MODES = ("stock", "group", "leave_one_out", "max_at_k")
OWNER = "trl-internal-testing"
# name: (model type, chat template of TRL, changes of the configuration)
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5", {}), "tiny-Qwen3ForCausalLM": ("qwen3", "qwen3", {"head_dim": 8}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}),
    "tiny-LlamaForCausalLM-3.2": ("llama", "llama3_2", {}), "tiny-MistralForCausalLM-0.2": ("mistral", "qwen2_5", {}),
    "tiny-Gemma2ForCausalLM": ("gemma2", "gemma", {"head_dim": 8}),
    "tiny-Cohere2ForCausalLM": ("cohere2", "cohere2", {}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", "glm4moe", {"n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                                                       "first_k_dense_replace": 1}),
    "tiny-GptOssForCausalLM": ("gpt_oss", "gptoss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", "qwen2_5", {"num_labels": 1}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", "qwen3", {"head_dim": 8, "num_labels": 1}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", "llama3_2", {"num_labels": 1}),
}
# Asked by the tests' own helpers; the installed version may know other packages.
MISSING = ("is_joblib_available", "is_harbor_available", "is_openreward_available", "is_mergekit_available")
LINES = ["Beautiful is better than", "Explicit is better than", "Simple is better than complex.", "Complex is better",
         "Flat is better than nested.", "Sparse is better", "Readability counts.", "Special cases aren't special",
         "Although practicality beats", "Errors should never pass", "Unless explicitly", "In the face of ambiguity,",
         "There should be one", "Although that way may not", "Now is better than never.", "Although never is often",
         "If the implementation is", "What is 2 times 3?", "Namespaces are one honking"]


def small_tokenizer(template: str):
    """A byte-level BPE of 400 tokens with the special tokens of ChatML and Llama 3, and TRL's chat template."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, special_tokens=special[:6], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(special[6:])
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / f"{template}.jinja").read_text()
    return tokenizer


def fill_cache(hub: Path) -> None:
    """Every model of MODELS in the Hub's cache format below `hub`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    for name, (kind, template, changes) in MODELS.items():
        folder = hub / f"models--{OWNER}--{name}" / "snapshots" / "0"
        tokenizer = small_tokenizer(template)
        tokenizer.save_pretrained(folder)
        config = AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=32, max_position_embeddings=4096, moe_intermediate_size=16,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **changes)
        torch.manual_seed(0)
        auto = AutoModelForSequenceClassification if "Sequence" in name else AutoModelForCausalLM
        model = auto.from_config(config).to(torch.bfloat16)
        with torch.no_grad():  # as TRL's: larger weights than a fresh model's, so that a step moves every parameter
            for weights in model.parameters():
                if weights.ndim > 1:
                    weights.normal_(0, 0.1)
        if auto is AutoModelForCausalLM:
            model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                                       pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(folder)
        (folder.parent.parent / "refs").mkdir()
        (folder.parent.parent / "refs" / "main").write_text("0")


def local_data(path: str, name: str | None = None, split: str | None = None, streaming: bool = False, **_):
    """Stands in for `datasets.load_dataset`: the configurations of TRL's data set `zen` that need no pictures."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    if path != f"{OWNER}/zen":
        raise ConnectionError(f"{path} is not made locally")
    prompts = LINES if name.startswith("standard") else [[{"role": "user", "content": line}] for line in LINES]
    sets = {"train": Dataset.from_dict({"prompt": prompts[:17]}), "test": Dataset.from_dict({"prompt": prompts[17:]})}
    if streaming:
        sets = {key: value.to_iterable_dataset() for key, value in sets.items()}
    return sets[split] if split else (IterableDatasetDict if streaming else DatasetDict)(sets)


def pytest_configure(config) -> None:
    """As a plugin of pytest: local data, and for all modes but "stock" our class under TRL's name."""
    import datasets
    import torch
    import trl
    from trl import import_utils

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    datasets.load_dataset = local_data
    # of a package that the installed version does not look for any more: it is not here
    for name in MISSING:
        if not hasattr(import_utils, name):
            setattr(import_utils, name, lambda: False)
    mode = os.environ["TRL_TESTS_MODE"]
    if mode != "stock":
        from grpo_engage.train.trainer import ReplyTrainer

        class GRPOTrainer(ReplyTrainer):
            def __init__(self, *arguments, **named):
                super().__init__(*arguments, **{"advantage": mode} | named)

        trl.GRPOTrainer = GRPOTrainer


def run_tests(checkout: Path, mode: str, hub: Path, expression: str) -> dict[str, str]:
    """{test: "passed", "failed: reason" or "skipped"} with `mode` in place of TRL's class."""
    report = hub / f"{mode}.xml"
    environment = os.environ | {"TRL_TESTS_MODE": mode, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1",
                                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(checkout),
                                                               *filter(None, [os.environ.get("PYTHONPATH")])])}
    # the checkout's folder `trl` must not stand in for the installed package: only its tests are put before it
    tests = hub / "checkout"
    if not tests.exists():
        tests.mkdir()
        (tests / "tests").symlink_to(checkout / "tests")
    environment["PYTHONPATH"] = environment["PYTHONPATH"].replace(f"{checkout}{os.pathsep}", "")
    subprocess.run([sys.executable, "-m", "pytest", "-p", "trl_tests", "-q", "--no-header", "--tb=line",
                    f"--junitxml={report}", "-k", expression, "--rootdir", str(tests),
                    str(tests / "tests" / "test_grpo_trainer.py")], cwd=tests, env=environment, check=False)
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        results[f"{case.get('classname').split('.')[-1]}::{case.get('name')}"] = (
            "passed" if child is None else "skipped" if child.tag == "skipped" else
            f"failed: {(child.get('message') or '').splitlines()[0][:150]}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("-k", default="not VLM and not Slow", dest="expression")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        fill_cache(Path(folder))
        table = pd.DataFrame({mode: run_tests(arguments.checkout.resolve(), mode, Path(folder), arguments.expression)
                              for mode in arguments.modes})
    table.index.name = "test"
    first = table[arguments.modes[0]]
    table = table[(first == "passed") | table.apply(lambda row: row.nunique() > 1, axis=1)]
    table.to_csv(arguments.out)
    print(table.eq("passed").sum().to_string())
    worse = table[(first == "passed") & ~table.eq("passed").all(axis=1)]
    print(worse.to_string() if len(worse) else "ours passes all that stock passes")
    return int(len(worse) > 0)


if __name__ == "__main__":
    sys.exit(main())
