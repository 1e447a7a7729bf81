"""ReplyTrainer: its gradient by enumeration, its parity with TRL's own trainers, and the rules of its settings."""

import importlib.util
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset
from training import make_trainer
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.policy.sampling import clean_text, format_prompt, load_policy
from grpo_engage.studies.enumeration import expected_gradient, relative_error, tiny_metric, tiny_trainer
from grpo_engage.text.diversity import marginal_credit
from grpo_engage.train.advantages import group_advantage, max_at_k_advantage, rms_scaled
from grpo_engage.train.loop import lora_config
from grpo_engage.train.objective import Objective
from grpo_engage.train.trainer import ReplyTrainer

specification = importlib.util.spec_from_file_location("gradient", REPO_ROOT / "proofs" / "gradient.py")
proof = importlib.util.module_from_spec(specification)
specification.loader.exec_module(proof)


@pytest.mark.parametrize(("name", "settings"), [
    *proof.grid(proof.SMALL[:1], (), False),
    *[case for case in proof.grid(proof.SMALL[1:2], (), False) if case[0] in ("max_at_2", "all three")],
    *[case for case in proof.grid((), proof.LARGE[1:2]) if case[0] == "all three" and "groups_per_step" in case[1]]])
def test_expected_gradient_is_the_exact_one(name, settings):
    assert relative_error(**settings) < 1e-8


def test_many_groups_in_one_step_give_what_each_of_them_gives_alone():
    function = tiny_metric("arbitrary")
    trainer = tiny_trainer(Objective(0.3, 0.5, 0.2), k=3, micro_batches=3, advantage="max_at_k", exact=True,
                           diversity_metric=function)
    alone, together, ordered = (expected_gradient(trainer, **how).clone() for how in (
        {}, {"groups_per_step": 25}, {"groups_per_step": 49, "ordered": True}))
    assert float((alone - together).norm() / alone.norm()) < 1e-12
    assert float((alone - ordered).norm() / alone.norm()) < 1e-12


def test_the_proof_can_fail():
    """The group's own standard deviation, and a length normalisation, are caught as biased."""
    for settings in ({"advantage": "group"}, {"loss_type": "grpo"}):
        assert relative_error(Objective(0.0, 1.0, 0.0), length=3, exact=False, **settings) > 1e-3


def test_subtracting_the_number_of_diversity_changes_no_gradient():
    assert proof.constant_number_error(1000.0) == 0.0


@pytest.mark.parametrize(("name", "settings"), list(proof.formula_cases())[::3])
def test_scaled_defaults_and_kl_follow_their_formulas(name, settings):
    steps, error = proof.formula_error(settings, every=200)
    assert steps == 4 and error < (1e-6 if settings["advantage"] == "group" else 1e-8)


@pytest.mark.parametrize("corrected", [True, False])
def test_kl_term_follows_its_formula_in_expectation(corrected):
    assert proof.kl_error(corrected, length=2) < 1e-8


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_max_at_k_by_enumerating_subsets(k):
    rewards = np.random.default_rng(1).integers(0, 6, size=(8, 5)) / 5
    for group, credit in zip(rewards, max_at_k_advantage(rewards, k), strict=True):
        subsets = list(combinations(range(5), k))
        for i in range(5):
            gain = sum(group[list(s)].max() - group[[j for j in s if j != i]].max() for s in subsets if i in s)
            assert credit[i] == pytest.approx(5 * gain / len(subsets), abs=1e-12)


def test_scaled_defaults_follow_their_formula():
    objective = Objective(0.0, 0.5, 0.2)
    trainer = tiny_trainer(objective, length=3, k=3, diversity_metric="distinct_n", advantage_clip=0.4)
    group = [(1, 2, 1), (1, 2, 0), (2, 0)]
    trainer.say_next([group])
    output = trainer._generate_and_score_completions([{"prompt": "yes no"}] * 3)
    credit = rms_scaled(3 * marginal_credit(["yes no yes", "yes no", "no"], "distinct_n"))
    rewards = np.array([[trainer.tables[0][reply] for reply in group]])
    combined = 0.5 * group_advantage(rewards)[0] + 0.2 * credit
    assert (np.abs(combined) > 0.4).any() and (np.abs(combined) < 0.4).any()
    np.testing.assert_allclose(output["advantages"].numpy(), np.clip(combined, -0.4, 0.4), atol=1e-6)


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


COMMON = dict(bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", logging_steps=1, seed=3,
              disable_tqdm=True, save_strategy="no", max_grad_norm=0.0)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_pure_reward_is_stock_grpo_exactly(base, pairs, tmp_path, beta):
    def brief(completions, **_):
        return [1 / (1 + len(text)) for text in completions]

    results = []
    for kind in (GRPOTrainer, partial(ReplyTrainer, fast_path=False)):
        model, tokenizer = load_policy(base)
        rows = Dataset.from_dict({"prompt": [format_prompt(post, tokenizer) for post in pairs["tweet"].unique()[:8]]})
        torch.manual_seed(0)
        gradients = Gradients()
        arguments = GRPOConfig(str(tmp_path), max_steps=5, learning_rate=1e-3, per_device_train_batch_size=4,
                               gradient_accumulation_steps=2, num_generations=4, max_completion_length=12, beta=beta,
                               **COMMON)
        trainer = kind(model, [brief], arguments, rows, processing_class=tokenizer, peft_config=lora_config(4),
                       callbacks=[gradients])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [{k: v for k, v in entry.items() if "time" not in k and "per_second" not in k and "profiling" not in k}
                for entry in trainer.state.log_history]
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        results.append((logs, gradients.seen, weights))
    (stock_logs, *stock), (logs, *ours) = results
    for theirs, mine in zip(stock_logs, logs, strict=True):
        assert theirs == {name: mine[name] for name in theirs}
    for theirs, mine in zip(stock, ours, strict=True):
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in theirs)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_pure_supervision_is_sft_and_generates_nothing(base, pairs, tmp_path, accumulation):
    few = pairs.head(8)
    results = []
    for kind in ("sft", "ours"):
        model, tokenizer = load_policy(base)
        prompts = [format_prompt(post, tokenizer) for post in few["tweet"]]
        replies = [clean_text(reply, tokenizer) for reply in few["reply"]]
        torch.manual_seed(0)
        gradients = Gradients()
        shared = COMMON | dict(max_steps=1, learning_rate=1e-3, per_device_train_batch_size=8 // accumulation,
                               gradient_accumulation_steps=accumulation)
        if kind == "sft":
            trainer = SFTTrainer(model, SFTConfig(str(tmp_path), completion_only_loss=True, max_length=512, **shared),
                                 train_dataset=Dataset.from_dict({"prompt": prompts, "completion": replies}),
                                 processing_class=tokenizer, peft_config=lora_config(4), callbacks=[gradients])
        else:
            trainer = ReplyTrainer(model, None, GRPOConfig(str(tmp_path), num_generations=8, **shared),
                                   Dataset.from_dict({"prompt": prompts, "reference": replies}),
                                   processing_class=tokenizer, peft_config=lora_config(4), callbacks=[gradients],
                                   objective=Objective(1.0, 0.0, 0.0))
            trainer._generate = None  # calling it would raise
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], gradients.seen))
    (their_loss, theirs), (our_loss, ours) = results
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    assert theirs.keys() == ours.keys()
    scale = max(float(grad.abs().max()) for grad in theirs.values())
    assert max(float((theirs[name] - ours[name]).abs().max()) for name in theirs) < 1e-6 * max(scale, 1)


def test_group_terms_come_every_nth_step_only(base, pairs, tmp_path):
    trainer = make_trainer(base, pairs, tmp_path, objective=Objective(1.0, 0.0, 0.3), max_steps=5, learning_rate=1e-3,
                           posts_per_step=2, num_generations=4, policy_every=2, micro_batch_size=4)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["diversity" in entry for entry in logs] == [True, False, True, False, True]
    assert all("supervised_loss" in entry and "reward" not in entry for entry in logs)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(objective=Objective(1.0, 0.0, 0.0), kl_weight=0.1), "KL term"),
    (dict(objective=Objective(0.0, 1.0, 0.0), policy_every=2), "policy_every"),
    (dict(advantage="best"), "advantage"), (dict(diversity_metric="bleu"), "diversity_metric"),
    (dict(max_k=9), "max_k"), (dict(exact=True), "exact"),
])
def test_contradictions_are_refused(settings, message):
    arguments = GRPOConfig("unused", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=message):
        ReplyTrainer(None, [len], arguments, None, **settings)
    arguments.beta = 0.1
    with pytest.raises(ValueError, match="both set"):
        ReplyTrainer(None, [len], arguments, None, kl_weight=0.1)


def test_references_are_asked_for():
    arguments = GRPOConfig("unused", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="'reference'"):
        ReplyTrainer(None, None, arguments, Dataset.from_dict({"prompt": ["a"]}), objective=Objective(1.0, 0.0, 0.0))
