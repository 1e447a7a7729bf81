"""One home for each parameter: cell, help, checks, manifest and consumer are what the stage's settings say."""

import ast
import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from peft import LoraConfig

from grpo_engage.base.core import write_json
from grpo_engage.base.settings import Settings, default_of
from grpo_engage.data.pairs import data_stage
from grpo_engage.data.settings import DataSettings
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.evaluation.generation import plan_jobs
from grpo_engage.evaluation.scoring import arms_reward
from grpo_engage.evaluation.settings import EvaluationSettings
from grpo_engage.policy import model_files, sampling
from grpo_engage.policy.replies import instruction_of, loading_options
from grpo_engage.rewards.engagement_model import EngagementRewardModel
from grpo_engage.rewards.settings import RewardChoice
from grpo_engage.rewards.training_reward import training_reward
from grpo_engage.run.cli import main
from grpo_engage.run.demonstration import demonstration_run, run_stage_function
from grpo_engage.run.graph import job_needs, job_parameters, jobs
from grpo_engage.run.settings import (
    GRAPH_PARAMETERS,
    SHARED,
    STAGES,
    load_preset,
    notebook_of,
    parameter_cell,
    resolve_config,
    stages_of,
    user_parameters,
)
from grpo_engage.train.arm_training import make_trainer, training_rows
from grpo_engage.train.hybrid import train_stage
from grpo_engage.train.objective import Objective
from grpo_engage.train.settings import TrainSettings


def cell_of(stage):
    cells = json.loads(notebook_of(stage).read_text(encoding="utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))


@pytest.mark.parametrize("stage", STAGES)
def test_the_parameters_cell_is_what_the_class_says_and_papermill_reads_it(stage):
    assert cell_of(stage) == parameter_cell(stage)
    kind, found = STAGES[stage].settings, papermill.inspect_notebook(str(notebook_of(stage)))
    assert set(found) - {"run_dir"} == set(kind.leaves())
    for name, entry in kind.leaves().items():
        assert found[name]["inferred_type_name"] == entry.type.__name__
        assert ast.literal_eval(found[name]["default"]) == default_of(entry) and len(found[name]["help"].split()) >= 2


@pytest.mark.parametrize("stage", STAGES)
def test_help_and_params_show_every_parameter(stage, capsys):
    helped = CliRunner().invoke(papermill_command, ["--help-notebook", str(notebook_of(stage))]).output
    assert main(["params", stage]) == 0
    shown = capsys.readouterr().out
    for name, entry in user_parameters(stage).items():
        assert name in helped and f"  {name}: {entry.type.__name__} = {default_of(entry)!r}\n" in shown


@pytest.mark.parametrize("stage", STAGES)
def test_the_config_of_a_run_holds_exactly_the_parameters(stage):
    config = resolve_config(load_preset("smoke")) | {"preset": "smoke"}
    given = job_parameters(config, stage, *(("grpo", 0) if stage == "train" else ()))
    assert given.keys() == STAGES[stage].settings.leaves().keys()
    assert STAGES[stage].settings.make(**given).flat() == given


# ---- the field test: every field of every stage reaches a consumer

def second_value(entry):
    """Another value of a parameter, one that is allowed."""
    facts, default = entry.metadata, default_of(entry)
    if facts["choices"]:
        return next(choice for choice in facts["choices"] if choice != default)
    if facts["of"]:
        return [facts["of"][0]]
    if entry.type is bool:
        return not default
    if entry.type is str:
        return default + "x"
    if entry.type is list:
        return [*default, 0.5]
    high, low = facts["high"], facts["low"]
    return default + 1 if default + 1 <= high else default - 1 if default - 1 >= low else (low + default) / 2


# Groups that a consumer takes whole, as keyword arguments of its own, so that one it does not know is a TypeError.
WHOLE = {"Adapter", "Loading", "EvaluationSampling", "HeuristicSettings"}
# Fields that a run of the simulator in one process on a CPU has no use for (micro_batch_size: by value, below).
ELSEWHERE = {"data_path", "columns", "separator", "thousands", "accelerate_config", "vllm_memory", "micro_batch_size",
             "safety_labels",  # wants a classifier: tests/test_safety_model.py
             "own_kept",  # wants own_samples: tests/test_arms.py
             "n_machines"}  # wants several processes: tests/test_cluster.py
CHECKS = {"check", "check_training", "check_participants", "check_rivals", "__post_init__", "__repr__", "__eq__"}


def owners(kind):
    """(class that declares it, name) of every parameter of `kind`."""
    for entry in fields(kind):
        if isinstance(entry.type, type) and issubclass(entry.type, Settings):
            yield from owners(entry.type)
        else:
            yield kind, entry.name


@pytest.fixture(scope="module")
def read_in_a_run():
    """(class, field) of everything that a small run of all stages reads, by who uses it: not by checks and records."""
    read, plain = set(), object.__getattribute__

    def noting(self, name):
        caller = sys._getframe(1)
        if caller.f_globals["__name__"] != "grpo_engage.base.settings" and caller.f_code.co_name not in CHECKS:
            read.add((type(self).__name__, name))
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "__getattribute__", noting, raising=False)
        run_dir = demonstration_run("paper")
        run_stage_function(run_dir, "best_of_n", best_of_n_posts=2, best_of_n_replies=2, max_new_tokens=4)
        run_stage_function(run_dir, "paper")
        plan_jobs(EvaluationSettings(rivals=["best_of_n"]))
    return read


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_reaches_whoever_uses_it(stage, read_in_a_run):
    """A field that is only checked and recorded is no parameter: `reward_penalty` was one, in the evaluation."""
    fields_of = {(kind.__name__, name) for kind, name in owners(STAGES[stage].settings)
                 if kind.__name__ not in WHOLE and name not in ELSEWHERE}
    assert fields_of - read_in_a_run == set()


TRAINED = {  # parameter -> what the trainer has of it, given the second value
    "max_steps": lambda t: t.args.max_steps, "save_steps": lambda t: t.args.save_steps,
    "warmup_steps": lambda t: t.args.warmup_steps,
    "gradient_checkpointing": lambda t: t.args.gradient_checkpointing,
    "max_new_tokens": lambda t: t.max_completion_length, "temperature": lambda t: t.temperature,
    "num_generations": lambda t: t.num_generations, "advantage": lambda t: t.advantage, "max_k": lambda t: t.max_k,
    "max_k_end": lambda t: t.k_schedule[0], "max_k_steps": lambda t: t.k_schedule[1],
    "diversity_form": lambda t: t.diversity_form,
    "diversity_metric": lambda t: t.diversity_metric, "advantage_clip": lambda t: t.advantage_clip,
    "loss_type": lambda t: t.args.loss_type, "num_iterations": lambda t: t.num_iterations,
    "max_length": lambda t: t.max_length, "learning_rate_policy": lambda t: t.args.learning_rate,
    "lora_r": lambda t: t.model.peft_config["default"].r,
    "lora_alpha": lambda t: t.model.peft_config["default"].lora_alpha,
}


def constant(posts, replies):
    return [0.4] * len(replies)


def trainer_with(base, pairs, folder, arm="grpo", **changes):
    settings = TrainSettings.make(arm=arm, gradient_accumulation=0, report_to="none", **changes)
    return make_trainer(base, pairs, folder, settings, reward=constant)


@pytest.mark.parametrize("name", TRAINED)
def test_training_receives_the_second_value_of_a_field(name, base, pairs, tmp_path):
    value = second_value(TrainSettings.leaves()[name])
    others = {"max_k": {"advantage": "max_at_k"}, "max_k_end": {"advantage": "max_at_k", "max_k_steps": 5},
              "max_k_steps": {"advantage": "max_at_k", "max_k_end": 2},
              "num_iterations": {"micro_batch_size": 4}}.get(name, {})
    # posts and groups have to divide, and nano reads 256 tokens
    value = {"num_generations": 2, "max_k": 3, "max_length": 200}.get(name, value)
    assert value != default_of(TrainSettings.leaves()[name])
    trainer = trainer_with(base, pairs, tmp_path, **{name: value} | others)
    assert TRAINED[name](trainer) == value


def test_training_receives_what_is_not_an_attribute(base, pairs, tmp_path):
    share = trainer_with(base, pairs, tmp_path, posts_per_step=6).args
    assert share.per_device_train_batch_size * share.gradient_accumulation_steps == 24
    cut = trainer_with(base, pairs, tmp_path, micro_batch_size=4).args
    assert (cut.per_device_train_batch_size, cut.gradient_accumulation_steps) == (4, 4)
    accumulated = make_trainer(base, pairs, tmp_path, TrainSettings.make(arm="grpo", gradient_accumulation=2,
                                                                         report_to="none"), reward=constant).args
    assert accumulated.gradient_accumulation_steps == 2
    supervised = trainer_with(base, pairs, tmp_path, arm="baseline", batch_size=6, learning_rate_supervised=3e-4).args
    assert supervised.per_device_train_batch_size == 6 and supervised.learning_rate == 3e-4
    assert trainer_with(base, pairs, tmp_path, kl_weight=0.5).beta == 0.5
    assert trainer_with(base, pairs, tmp_path, arm="hybrid", policy_every=2).policy_every == 2
    modules = trainer_with(base, pairs, tmp_path, target_modules="q_proj,v_proj").model.peft_config["default"]
    assert isinstance(modules, LoraConfig) and modules.target_modules == {"q_proj", "v_proj"}
    passing = trainer_with(base, pairs, tmp_path, reward_pass_threshold=0.5).reward_funcs[0]
    assert passing(completions=["a"], post=["b"]) == [0.0]
    weighted = TrainSettings.make(arm="hybrid", alpha=0.5, beta=0.25, lam=0.125, warm_start="base")
    assert weighted.objective().__dict__ == dict(alpha=0.5, beta=0.25, lam=0.125, warm_start="base")
    reported = make_trainer(base, pairs, tmp_path, TrainSettings.make(arm="grpo"), reward=constant)
    assert any("TensorBoard" in type(callback).__name__ for callback in reported.callback_handler.callbacks)


def test_the_instruction_reaches_the_prompts_of_training(base, pairs, tmp_path):
    """nano's template has no place for it, so a template that has is put in."""
    tokenizer = sampling.load_policy(base)[1]
    tokenizer.chat_template = "{% for m in messages %}<|post|>{{ m['content'] }}{% endfor %}<|reply|>"
    rows = training_rows(pairs, tokenizer, Objective(0, 1, 0), 2, "Answer in rhyme.")
    assert "Answer in rhyme." in rows["prompt"][0]


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory):
    """A run folder whose reward model disagrees with itself, so that a penalty shows."""
    run_dir = tmp_path_factory.mktemp("scored")
    pairs = simulate_pairs(60, seed=3)
    counts = np.log1p(pairs["reply_likes"].to_numpy(dtype=float))
    labels = {"residual": counts, "engagement": pairs["reply_likes"].to_numpy(dtype=float),
              "expected": np.ones(len(pairs))}
    model = EngagementRewardModel("hashing", members=2, hidden_size=8, epochs=1)
    model.fit(pairs, pd.DataFrame(labels, index=pairs.index), 1)
    model.save(run_dir / "reward_model" / "reward")
    write_json(run_dir / "reward_model" / "validation.json",
               {"verdicts": {"reward": {"validated": True, "text": "fine"}}})
    return run_dir, pairs


@pytest.mark.parametrize("name", [name for name in RewardChoice.leaves() if name != "allow_unvalidated_reward"])
def test_the_evaluation_scores_by_the_reward_that_trained(scored_run, name, tmp_path):
    """The lost penalty: the evaluation had its own list of names, and reward_penalty was not on it."""
    run_dir, pairs = scored_run
    value = second_value(RewardChoice.leaves()[name])
    choice = RewardChoice.make(**{name: value})
    write_json(run_dir / "train" / "grpo" / "seed0" / "manifest.json",
               {"reward": "x", "parameters": TrainSettings.make(arm="grpo", **choice.flat()).recorded()})
    trained, its_name, _ = training_reward(run_dir, choice)
    scores, named = arms_reward(run_dir, [("baseline", 0), ("grpo", 0)])
    texts = pairs["tweet"].tolist()[:20], pairs["reply"].tolist()[:20]
    assert named == its_name and (scores(*texts) == trained(*texts)).all()
    assert (trained(*texts) != training_reward(run_dir)[0](*texts)).any()  # and the second value is another reward


def test_loading_and_instruction_of_a_run_come_from_its_policy():
    facts = {"name": "x", "quantization": "4bit", "attention": "sdpa", "revision": "v1", "instruction": "Be kind."}
    assert loading_options(facts) == {"quantization": "4bit", "attention": "sdpa", "revision": "v1"}
    assert instruction_of(facts) == "Be kind."


def test_a_revision_reaches_transformers(monkeypatch):
    assert sampling.loading_settings(revision="v1")["revision"] == "v1"
    heard = []
    monkeypatch.setattr(model_files.AutoTokenizer, "from_pretrained",
                        lambda *_, **named: heard.append(named) or (_ for _ in ()).throw(OSError("enough")))
    with pytest.raises(OSError):
        sampling.load_policy("x", revision="v1")
    assert heard[0]["revision"] == "v1"


# ---- names and presets

def test_a_name_that_is_not_one_thing_is_refused_with_the_dotted_forms():
    several = {}
    for stage in STAGES:
        for name in user_parameters(stage):
            several.setdefault(name, []).append(stage)
    for name, stages in several.items():
        if len(stages) > 1 and name not in SHARED:
            with pytest.raises(ValueError, match=f"-p {stages[0]}.{name}=... or -p {stages[1]}.{name}="):
                stages_of(name)
        else:
            assert stages_of(name) == stages
    assert {"batch_size", "temperature"} <= {name for name, stages in several.items() if len(stages) > 1}


def test_a_preset_says_only_what_differs():
    """As a copy of `gpu` this preset had lost settings."""
    gpu, vllm = resolve_config(load_preset("gpu")), resolve_config(load_preset("gpu-vllm"))
    for arm, given in vllm["stages"]["train"].items():
        differs = {name for name, value in given.items() if gpu["stages"]["train"][arm][name] != value}
        assert differs == {"generation_engine"}
    assert {stage: v for stage, v in vllm["stages"].items() if stage != "train"} == {
        stage: v for stage, v in gpu["stages"].items() if stage != "train"}


def test_a_preset_of_ones_own_by_its_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: smoke\ntrain: {grpo: {max_steps: 7}}\n")
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "check", "--settings", "--preset",
                           str(tmp_path / "mine.yaml")], capture_output=True, text=True)
    assert done.returncode == 0 and "is valid" in done.stdout, done.stderr
    assert resolve_config(load_preset(str(tmp_path / "mine.yaml")))["stages"]["train"]["grpo"]["max_steps"] == 7


NAMED = """extends: smoke
arms: [baseline, grpo, grpo_k16, hybrid_l5, hybrid_l1, long]
train:
  grpo_k16: {like: grpo, num_generations: 16}
  hybrid_l5: {like: hybrid, lam: 0.5}
  hybrid_l1: {like: hybrid_l5, lam: 1.0, warm_start: grpo_k16}
  long: {like: baseline_long}
"""


def test_arms_that_a_preset_names_reach_their_jobs_and_the_evaluation(tmp_path):
    (tmp_path / "mine.yaml").write_text(NAMED)
    config = resolve_config(load_preset(str(tmp_path / "mine.yaml"))) | {"preset": "mine"}
    smoke = resolve_config(load_preset("smoke"))["stages"]["train"]
    made = {job[1]: TrainSettings.make(**job_parameters(config, *job)) for job in jobs(config) if job[0] == "train"}
    differs = {arm: {name for name, value in given.flat().items() if value != {"arm": of, "keep_checkpoints": True}.get(
        name, smoke[of].get(name, 0))} for arm, given, of in [(arm, made[arm], of) for arm, of in (
            ("grpo", "grpo"), ("grpo_k16", "grpo"), ("hybrid_l5", "hybrid"), ("hybrid_l1", "hybrid"))]}
    own = {"arm", "like"}
    assert differs == {"grpo": set(), "grpo_k16": own | {"num_generations"}, "hybrid_l5": own | {"lam"},
                       "hybrid_l1": own | {"lam", "warm_start"}}
    weights = [(arm.beta, arm.lam, arm.warm_start) for arm in (made[name].objective() for name in made)]
    assert weights == [(0, 0, "base"), (1, 0, "baseline"), (1, 0, "baseline"), (0.5, 0.5, "baseline"),
                       (0.5, 1.0, "grpo_k16"), (0, 0, "baseline")]
    assert ("train", "grpo_k16", 0) in job_needs(config, "train", "hybrid_l1", 0)
    planned = plan_jobs(EvaluationSettings.make(**job_parameters(config, "evaluation")))
    kinds = {job.arm: job.kind for job in planned if job.split == "test"}
    assert [kinds[arm] for arm in config["arms"]] == ["trained"] * 5 + ["rival"]  # a yardstick is no hypothesis


@pytest.mark.parametrize(("entry", "message"), [
    ("Fast: {like: grpo}", "mine.yaml, line 4: arm='Fast' is no name"), ("real: {like: grpo}", "line 4: .*is taken"),
    ("base: {like: grpo}", "line 4: .*is taken"), ("a: {like: b}", "line 4: there is no arm 'b'"),
    ("fast: {max_steps: 3}", "line 4: there is no arm 'fast'"), ("grpo: {like: hybrid}", "line 4: .*another name"),
    ("a: {like: b}\n  b: {like: a}", "line 4: arms are like each other .*a -> b -> a"),
    ("a: {like: grpo, lamb: 1}", "no parameter 'lamb'; did you mean 'lam'")])
def test_an_arm_that_cannot_be_is_refused_with_its_line(tmp_path, entry, message):
    (tmp_path / "mine.yaml").write_text(f"extends: smoke\ntrain:\n  max_steps: 3\n  {entry}\n")
    with pytest.raises(ValueError, match=message):
        resolve_config(load_preset(str(tmp_path / "mine.yaml")))


def test_plain_papermill_refuses_what_check_refuses(tmp_path):
    (tmp_path / "data").mkdir()
    done = subprocess.run([sys.executable, "-m", "papermill", str(notebook_of("train")), str(tmp_path / "out.ipynb"),
                           "--cwd", str(notebook_of("train").parent), "-p", "run_dir", str(tmp_path),
                           "-p", "num_generations", "1"], capture_output=True, text=True)
    assert done.returncode and "outside [2..256]" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(("name", "value", "message"), [
    ("max_steps", "three", "must be of type int"), ("advantage", "gruop", "did you mean 'group'?")])
def test_the_cells_that_papermill_fills_in_refuse_it_too(name, value, message, tmp_path, monkeypatch):
    """As above, without a kernel of its own: the parameters and the stage's cell of the notebook that it would run."""
    monkeypatch.chdir(notebook_of("train").parent)
    given = {"run_dir": str(tmp_path), name: value}
    notebook = parameterize_notebook(load_notebook_node(str(notebook_of("train"))), given)
    tags = {"parameters", "injected-parameters", "stage"}
    space = {"TrainSettings": TrainSettings, "train_stage": train_stage}
    with pytest.raises((ValueError, TypeError)) as error:
        for cell in notebook.cells:
            if tags & set(cell.metadata.get("tags", ())):
                exec(cell.source, space)
    assert message in str(error.value) and space["run_dir"] == str(tmp_path) and not list(tmp_path.iterdir())


def test_the_manifest_records_what_the_settings_are(tmp_path):
    data_stage(tmp_path, DataSettings(n_conversations=30, seed=4))
    recorded = json.loads((tmp_path / "data" / "manifest.json").read_text())["parameters"]
    assert recorded == DataSettings(n_conversations=30, seed=4).recorded()
    assert not GRAPH_PARAMETERS & recorded.keys()
