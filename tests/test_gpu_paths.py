"""What a CPU can prove about the paths for a GPU: bfloat16, 4 bits, vLLM, weights in pieces, the check itself."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from training import make_trainer, train_arm
from transformers import TrainerCallback
from trl.generation import vllm_generation

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.evaluation.settings import EvaluationSettings
from grpo_engage.paper.settings import PaperSettings
from grpo_engage.policy.sampling import generate_replies, load_adapted, load_policy, reply_nll
from grpo_engage.policy.settings import PolicySettings
from grpo_engage.rewards import causal_reward
from grpo_engage.train.arm_training import sampling_engine
from grpo_engage.train.objective import Objective
from grpo_engage.train.settings import Sampling, TrainSettings

HYBRID = Objective(0.3, 0.5, 0.2)
SMALL = dict(max_steps=4, save_steps=2, posts_per_step=4, num_generations=4, learning_rate=1e-3, batch_size=8,
             kl_weight=0.02, max_new_tokens=12)


def short(posts, replies):
    return np.array([1 / (1 + len(reply.split())) for reply in replies])


def trained(base, pairs, place, loading, **changes):
    """(log, adapter) of a hybrid arm that starts from a baseline, both loaded by `loading`."""
    train_arm(base, pairs, place / "baseline", objective=Objective(1.0, 0.0, 0.0), loading=loading, **SMALL)
    log = train_arm(base, pairs, place / "hybrid", objective=HYBRID, reward=short, reward_id="short", loading=loading,
                    warm_start=place / "baseline" / "adapter", **SMALL | changes)
    return log, load_file(place / "hybrid" / "adapter" / "adapter_model.safetensors")


def nll(base, pairs, **loading):
    few = pairs.head(8)
    table = reply_nll(*load_policy(base, **loading), few["tweet"].tolist(), few["reply"].tolist())
    return table["nll"].sum() / table["n_tokens"].sum()


# ---- bfloat16

def test_bfloat16_is_a_parameter_of_weights_and_of_training(base, pairs, tmp_path):
    model, tokenizer = load_policy(base, precision="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    whole, half = nll(base, pairs), nll(base, pairs, precision="bfloat16")
    assert abs(half / whole - 1) < 0.02 and half != whole
    posts = pairs["tweet"].unique().tolist()[:2]
    made = generate_replies(model, tokenizer, posts, 2, max_new_tokens=8, label="")
    assert model.fast_path_agrees and (made["log_prob"] < 0).all() and made["text"].str.len().gt(0).any()
    for precision in ("bfloat16", "auto"):
        trainer = make_trainer(base, pairs, tmp_path / precision, objective=HYBRID, reward=short, max_steps=1,
                               learning_rate=1e-3, loading={"precision": precision})
        assert trainer.args.bf16 == (precision == "bfloat16" or torch.cuda.is_available())


@pytest.mark.slow  # bfloat16 is slow on a CPU
def test_an_arm_in_bfloat16_learns_what_it_learns_in_float32_and_resumes_to_the_same_bytes(base, pairs, tmp_path):
    half, whole = {"precision": "bfloat16"}, {"precision": "float32"}
    log, adapter = trained(base, pairs, tmp_path / "half", half)
    expected, _ = trained(base, pairs, tmp_path / "whole", whole)
    assert np.isfinite(log[["loss", "grad_norm", "reward", "kl", "entropy", "supervised_loss"]]).all(axis=None)
    assert abs(log["supervised_loss"] / expected["supervised_loss"] - 1).max() < 0.1
    assert {value.dtype for value in adapter.values()} == {torch.float32}  # what is trained has all its digits
    assert max(float(value.abs().max()) for name, value in adapter.items() if "lora_B" in name) > 1e-4

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_again(base, pairs, tmp_path, half, callbacks=[Stop()])
    train_again(base, pairs, tmp_path, half)
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
                for name in ("half/hybrid", "again"))
    assert one == two
    model, tokenizer = load_adapted(base, tmp_path / "again" / "adapter", **half)
    assert len(generate_replies(model, tokenizer, pairs["tweet"].tolist()[:2], 2, max_new_tokens=8, label="")) == 4


def train_again(base, pairs, place, loading, **more):
    return train_arm(base, pairs, place / "again", objective=HYBRID, reward=short, reward_id="short", loading=loading,
                     warm_start=place / "half" / "baseline" / "adapter", **SMALL, **more)


def test_a_reward_of_a_language_model_can_be_read_in_bfloat16(monkeypatch, base):
    model = causal_reward.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    model.config.pad_token_id = 0
    scores = [float(model.to(dtype)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
              for dtype in (torch.bfloat16, torch.float32)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


@pytest.mark.slow
def test_a_whole_run_of_nano_in_bfloat16(tmp_path):
    """Every stage to the paper, by the parameter alone."""
    words = ["n_conversations=120", "max_steps=2", "n_test_posts=4", "n_validation_posts=4", "n_samples=16",
             "n_boot=200", "max_new_tokens=12", "allow_unvalidated_reward=true", "best_of_n_posts=2",
             "best_of_n_replies=4", "rivals=[real]", "temperatures=[]", "embeddings=false", "watch_posts=2",
             "arms=[baseline, grpo]", "threads=0", "precision=bfloat16"]
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "run", "--preset", "smoke", "--run", "half",
                           *[word for text in words for word in ("-p", text)]], capture_output=True, text=True,
                          env=environment(GRPO_ENGAGE_RUNS=str(tmp_path)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads((tmp_path / "half" / "policy" / "policy.json").read_text())
    assert facts["dtype"] == facts["precision"] == "bfloat16"
    metrics = pd.read_csv(tmp_path / "half" / "evaluation" / "metrics.csv")
    mine = metrics[metrics["arm"].isin(["baseline", "grpo"])].set_index(["arm", "metric"])["value"]
    for name in ("pass@1", "pass@10", "self_bleu", "gold_appeal", "judge_engagement", "rouge_l"):
        assert np.isfinite(mine.xs(name, level="metric")).all(), name
    assert (tmp_path / "half" / "paper" / "main.pdf").read_bytes().startswith(b"%PDF")


def environment(**more):
    return os.environ | {"PYTHONPATH": str(REPO_ROOT)} | more


# ---- 4 bits

@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="pip install bitsandbytes: it computes on a CPU too")
def test_four_bits_load_sample_and_train(base, pairs, tmp_path):
    import bitsandbytes

    model, _ = load_policy(base, "4bit")
    four = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(four) == 7 * model.config.num_hidden_layers
    assert nll(base, pairs, quantization="4bit") == pytest.approx(nll(base, pairs), rel=0.1)
    log, adapter = trained(base, pairs, tmp_path, {"quantization": "4bit"}, max_steps=2)
    assert np.isfinite(log[["loss", "grad_norm", "reward", "kl"]]).all(axis=None)
    assert not any("base_layer" in name for name in adapter)
    assert {value.dtype for value in adapter.values()} == {torch.float32}  # TRL's own would be bfloat16
    loaded = load_adapted(base, tmp_path / "hybrid" / "adapter", quantization="4bit")
    assert len(generate_replies(*loaded, pairs["tweet"].tolist()[:2], 2, max_new_tokens=8, label="")) == 4


# ---- vLLM

@pytest.fixture
def vllm(monkeypatch):
    """The double in place of the package, also for TRL, which looked for it when it was imported."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "vllm_double")
    import vllm as double

    for name in ("LLM", "SamplingParams", "RequestOutput"):
        monkeypatch.setattr(vllm_generation, name, getattr(double, name), raising=False)
    double.made.clear()
    yield double
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def test_vllm_is_asked_for_what_training_scores(base, pairs, tmp_path, vllm):
    few = pairs.drop_duplicates("tweet").head(4)
    log = train_arm(base, few, tmp_path / "arm", objective=HYBRID, reward=short, reward_id="short",
                    generation_engine="vllm", vllm_memory=0.4, temperature=1.3, **SMALL | {"max_steps": 2})
    llm, = vllm.made
    assert llm.named["model"] == str(base) and llm.named["gpu_memory_utilization"] == 0.4
    assert llm.named["logprobs_mode"] == "processed_logprobs" and llm.named["quantization"] is None
    asked = [call for call in llm.calls if call[0] == "generate"]
    assert [n for _, n, _ in asked] == [16, 16]
    told = asked[0][2]
    ends = load_policy(base)[0].generation_config.eos_token_id
    assert told | {"stop_token_ids": ends} == told and told["temperature"] == 1.3 and told["max_tokens"] == 12
    assert (told["n"], told["top_p"], told["top_k"], told["min_p"], told["repetition_penalty"]) == (1, 1, 0, 0, 1)
    # every weight is pushed before each sampling, and the second time it is what the first step has learned
    names = set(llm.weights)
    assert llm.pushes and set(llm.pushes[: len(llm.pushes) // 2]) == names
    assert [kind for kind, *_ in llm.calls] == ["reset", "generate"] * 2
    own = load_policy(base)[0].state_dict()
    moved = max(float((llm.weights[name].detach() - own[name]).abs().max()) for name in names)
    assert 1e-6 < moved < 1
    assert log["mean_length"].between(1, 12).all() and np.isfinite(log["loss"]).all()


def test_what_vllm_says_is_as_likely_as_training_finds_it(base, pairs, tmp_path, vllm):
    """Its log-probs and the trainer's are those of one distribution: the correction that TRL takes is 1."""
    few = pairs.drop_duplicates("tweet").head(4)
    trainer = make_trainer(base, few, tmp_path, objective=Objective(0.0, 1.0, 0.0), reward=short,
                           generation_engine="vllm", temperature=0.8, **SMALL)
    rows = [trainer.train_dataset[index] for index in range(4) for _ in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions(rows)
    ratio = output["importance_sampling_ratio"]
    mask = output["completion_mask"].bool() if ratio.shape == output["completion_mask"].shape else ratio > 0
    assert mask.any() and (ratio[mask] - 1).abs().max() < 1e-3


def test_a_call_that_vllm_would_refuse_is_refused_by_the_double(base, vllm):
    with pytest.raises(TypeError, match=r"does not take \['gpu_memory'\]"):
        vllm.LLM(model=str(base), gpu_memory=0.5)
    with pytest.raises(TypeError, match="SamplingParams has no"):
        vllm.SamplingParams(temperature=1.0, max_new_tokens=3)


def test_a_temperature_that_vllm_refuses_is_named_before_training(monkeypatch):
    monkeypatch.setattr("grpo_engage.train.arm_training.find_spec", lambda name: True)
    assert sampling_engine(Sampling(generation_engine="vllm", temperature=2.0))["use_vllm"]
    with pytest.raises(ValueError, match="temperature=2.5.*vLLM takes at most 2"):
        sampling_engine(Sampling(generation_engine="vllm", temperature=2.5))


# ---- weights in pieces

@pytest.fixture(scope="module")
def pieces():
    sys.path.insert(0, str(REPO_ROOT / "proofs"))
    try:
        specification = importlib.util.spec_from_file_location("pieces", REPO_ROOT / "proofs" / "pieces.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("way", [
    "fsdp", pytest.param("deepspeed", marks=pytest.mark.skipif(not find_spec("deepspeed"),
                                                               reason="pip install deepspeed"))])
def test_two_processes_that_hold_the_weights_in_pieces_compute_what_one_computes(pieces, way):
    for row in pieces.compare(way, ["all three, KL to the start, LoRA", "supervised"]):
        assert row.pop("way") == way
        assert row.pop("held") == way and float(row.pop("weights_moved_by")) > 1e-3
        name = row.pop("case")
        assert max(map(float, row.values())) <= pieces.processes.TOLERANCE, (name, row)


# ---- the check itself

def test_the_gpu_check_runs_here_with_a_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPO_ROOT / "benchmarks")
    import gpu_check

    monkeypatch.setitem(gpu_check.CHECKS, "broken", lambda bench: 1 / 0)
    names = ["attention", "fast path", "step", "vllm", "broken"]
    bench = gpu_check.Bench(tmp_path / "scratch", tiny=True, rounds=1)
    checks = list(gpu_check.results(bench, names, minutes=10))
    found = {row["check"]: row["result"] for row in checks}
    assert found == {"attention": "ok", "fast path": "ok", "step": "ok", "vllm": "not run", "broken": "failed"}
    gpu_check.write(tmp_path, gpu_check.machine(bench), checks, bench.timings)
    ratio = pd.read_csv(tmp_path / "speed.csv")
    assert ratio["way"].tolist() == ["stock grpo", "grpo", "stock", "ours"] and (ratio["seconds"] > 0).all()
    text = (tmp_path / "table.md").read_text()
    assert "| broken | failed |" in text and "ZeroDivisionError" in text and "| grpo step | 2x2x4 | grpo |" in text
    late = list(gpu_check.results(bench, ["attention"], minutes=0))
    assert late[0]["result"] == "not run" and "minutes were over" in late[0]["note"]
    if not torch.cuda.is_available():
        assert gpu_check.main([str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
        assert "no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_gpu_check_here(tmp_path):
    done = subprocess.run([sys.executable, str(REPO_ROOT / "benchmarks" / "gpu_check.py"), str(tmp_path), "--tiny",
                           "--rounds", "1"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "checks.csv").set_index("check")["result"]
    assert table.drop(["4bit", "vllm"]).eq("ok").all() and table["vllm"] == "not run"
    assert table["4bit"] == ("ok" if find_spec("bitsandbytes") else "not run")


def test_what_differs_too_much_fails(monkeypatch):
    monkeypatch.syspath_prepend(REPO_ROOT / "benchmarks")
    import gpu_check

    assert gpu_check.near(1.01, 1.0, 0.02, "nats") == "nats 1.0100 against 1.0000 (1.00%)"
    for found in (1.03, float("nan")):
        with pytest.raises(AssertionError, match="allowed 2%"):
            gpu_check.near(found, 1.0, 0.02, "nats")


# ---- the way there and back

def test_the_wheels_are_split_into_parts_that_can_be_carried(monkeypatch):
    monkeypatch.syspath_prepend(REPO_ROOT / "benchmarks")
    import gpu_wheels

    assert gpu_wheels.parts({"a": 40, "b": 30, "c": 20, "d": 10}, 64) == [["a", "c"], ["b", "d"]]
    with pytest.raises(ValueError, match="torch has 0 MiB alone"):
        gpu_wheels.parts({"torch": 64}, 64)
    assert {name.partition("==")[0].lower().replace("_", "-") for name in gpu_wheels.locked()} == {*gpu_wheels.NEEDED}
    with pytest.raises(FileNotFoundError, match="carry what `pack` left there"):
        gpu_wheels.unpack(REPO_ROOT / "nowhere", REPO_ROOT / "nowhere")


def test_gpu_check_loads_nothing_that_is_neither_there_nor_among_the_wheels(monkeypatch):
    """In a process of its own: which distributions its modules are from, less what the four packages bring."""
    program = """if True:
    import importlib.metadata, re, sys
    from packaging.requirements import Requirement
    sys.path.insert(0, "benchmarks")
    import gpu_check, gpu_wheels
    def name(text): return re.sub("[-_.]+", "-", text).lower()
    there, ask = set(), ["torch", "transformers", "accelerate", "peft"]
    while ask:
        package = name(ask.pop())
        if package in there:
            continue
        there.add(package)
        try:
            needs = map(Requirement, importlib.metadata.requires(package) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
        ask += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    owners = importlib.metadata.packages_distributions()
    used = {name(owner) for module in {module.partition(".")[0] for module in sys.modules}
            for owner in owners.get(module, [])}
    print(sorted(used - there - {*gpu_wheels.NEEDED, "grpo-engage"}))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO_ROOT, capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    optional = {"colorama", "protobuf", "deepspeed", "bitsandbytes"}  # taken where they are there
    assert set(json.loads(done.stdout.splitlines()[-1].replace("'", '"'))) <= optional


def commands():
    """The commands in the code blocks of docs/gpu.md and in the cells of docs/colab.ipynb."""
    text = (REPO_ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
             for line in block.splitlines()]
    notebook = json.loads((REPO_ROOT / "docs" / "colab.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    return lines, [line for cell in cells for line in "".join(cell["source"]).splitlines()]


def test_every_line_of_the_way_says_whether_it_was_tried_and_names_what_there_is():
    lines, cells = commands()
    assert len(lines) > 20 and all(re.search(r"#.*(run here|not run)|^#", line) for line in lines), lines
    whole = (REPO_ROOT / "docs" / "gpu.md").read_text(encoding="utf-8") + "\n".join(cells)
    targets = set(re.findall(r"^([a-z-]+):", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|[!&] ?)make ([a-z-]+)", "\n".join([*lines, *cells]), re.MULTILINE)) <= targets
    names = set(re.findall(r"-p ([a-z_.]+)=", whole))
    known = {name for settings in (PolicySettings, TrainSettings, EvaluationSettings, PaperSettings)
             for name in settings.leaves()}
    assert len(names) > 8 and {name.rpartition(".")[2] for name in names} <= known
    for name in re.findall(r"\]\(([^)#:]+)\)|`((?:benchmarks|configs|proofs|tests)/[\w./-]+)`", whole):
        place = "".join(name)
        assert (REPO_ROOT / place).exists() or (REPO_ROOT / "docs" / place).exists(), place


def test_the_container_copies_and_installs_what_there_is():
    text = (REPO_ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert len(copied) > 5 and all((REPO_ROOT / name).exists() for name in copied)
    needs = re.search(r"^\$\(READY\): (.*)$", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(needs) <= set(copied)  # else make would install again
