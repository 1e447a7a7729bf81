"""ReplyTrainer where a user of TRL would put its own trainers: data in every form, TRL settings, clear refusals."""

import math
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from grpo_engage.studies.enumeration import END, tiny_policy, tiny_tokenizer
from grpo_engage.train.objective import Objective
from grpo_engage.train.reference_trainer import ReplyConfig
from grpo_engage.train.trainer import ReplyTrainer

ALONE, MIXED, GRPO = Objective(1, 0, 0), Objective(0.5, 1, 0), Objective(0, 1, 0)
POSTS = [{"prompt": prompt, "reference": reference} for prompt, reference in (
    ("yes no", "why no"), ("no", "yes"), ("why", "no no no"), ("yes", "why"), ("no yes", "yes yes why"))]
SETTINGS = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "max_completion_length": 3, "learning_rate": 0.01}


def whys(completions, **_):
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [text.split().count("why") / 4 for text in texts]


def made(tmp_path, objective=MIXED, rows=POSTS, model=None, tokenizer=None, peft_config=None, evaluated=None,
         rewards=whys, trainer=None, **changes):
    """A trainer of the tiny policy: two prompts with four replies a step, or two references; trainer: its settings."""
    alone = not (objective.beta or objective.lam)
    sizes = {"per_device_train_batch_size": 2} if alone else {"per_device_train_batch_size": 8, "num_generations": 4}
    arguments = ReplyConfig(str(tmp_path), generates=not alone, **SETTINGS | sizes | changes)
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scale_rewards='group'")
        built = ReplyTrainer(tiny_policy(3) if model is None else model, rewards, arguments, data, evaluated,
                             tokenizer or tiny_tokenizer(3), peft_config=peft_config, objective=objective,
                             **trainer or {})
    built.remove_callback(PrinterCallback)
    return built


def seen_references(trainer) -> list[str]:
    """The references in the order in which they are trained on, once `trainer` has trained."""
    seen, original = [], trainer._supervised_loss

    def noting(model, inputs):
        for labels in inputs["reference_labels"]:
            if (labels != -100).any():
                seen.append(trainer._tokenizer.decode(labels[labels != -100], skip_special_tokens=True))
        return original(model, inputs)

    trainer._supervised_loss = noting
    trainer.train()
    return seen


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- a drop-in: nothing differs where the objective is TRL's


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("lora", [True, False])
def test_pure_reward_is_stock_grpo_to_the_bit(tmp_path, lora, beta, accumulation, iterations):
    """Weights and logs after four steps, of a model from a folder (as TRL's reference of a full model needs it)."""
    tiny_policy(3).float().save_pretrained(tmp_path / "model")
    results = []
    for kind in (GRPOTrainer, partial(ReplyTrainer, fast_path=False)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        adapter = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        torch.manual_seed(0)
        arguments = GRPOConfig(str(tmp_path), max_steps=4, num_generations=4, beta=beta, num_iterations=iterations,
                               per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
                               **SETTINGS)
        trainer = kind(model, whys, arguments, Dataset.from_list(POSTS), processing_class=tiny_tokenizer(3),
                       peft_config=adapter if lora else None)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        results.append((trainer.state.log_history, dict(trainer.model.named_parameters())))
    (stock_log, stock), (log, ours) = results
    assert stock.keys() == ours.keys() and all(torch.equal(stock[name], ours[name]) for name in stock)
    timed = ("time", "per_second", "profiling")
    for theirs, mine in zip(stock_log, log, strict=True):
        kept = {name: value for name, value in theirs.items() if not any(word in name for word in timed)}
        assert kept and kept == {name: mine[name] for name in kept}


# --- data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 1), (2, 2), (8, 1), (1, 3)])
def test_every_reference_once_an_epoch(tmp_path, stream, batch, accumulation):
    """Also the last, incomplete batch, and where there are fewer references than a batch holds."""
    rows = Dataset.from_list(POSTS)
    steps = math.ceil(math.ceil(5 / batch) / accumulation)
    trainer = made(tmp_path, ALONE, rows.to_iterable_dataset() if stream else rows, per_device_train_batch_size=batch,
                   gradient_accumulation_steps=accumulation, **{"max_steps": 2 * steps} if stream and accumulation == 1
                   else {"max_steps": 1} if stream else {"num_train_epochs": 2})
    seen = seen_references(trainer)
    first = seen[: 5 if not stream or accumulation == 1 else batch * accumulation]
    assert sorted(first) == sorted(row["reference"] for row in POSTS)[: len(first)] or len(set(first)) == len(first)
    if not stream:
        assert sorted(seen) == sorted([row["reference"] for row in POSTS] * 2) and seen[:5] != seen[5:]
        assert trainer.state.global_step == 2 * steps


def test_the_last_small_batch_is_divided_by_its_own_tokens(tmp_path):
    trainer = made(tmp_path, ALONE, POSTS[:3], shuffle_dataset=False, num_train_epochs=1, learning_rate=1e-12)
    trainer.train()
    by_hand = []
    for rows in (POSTS[:2], POSTS[2:3]):
        table = made(tmp_path, ALONE, rows)._references(rows, 1)
        logp = tiny_policy(3)(input_ids=table["reference_ids"], attention_mask=table["reference_mask"]).logits
        logp = logp.log_softmax(-1)[:, :-1]
        labels = table["reference_labels"][:, 1:]
        picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
        by_hand.append(-float(picked.detach().mean()))
    np.testing.assert_allclose(logged(trainer, "supervised_loss"), by_hand, rtol=1e-6)


def test_too_few_prompts_for_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a step needs 2 prompts .* but train_dataset has 1"):
        made(tmp_path, GRPO, POSTS[:1], max_steps=1).train()


@pytest.mark.parametrize("objective", [ALONE, MIXED])
def test_several_references_are_all_trained_on(tmp_path, objective):
    rows = [{"prompt": "yes no", "reference": ["why no", "yes"]},
            {"prompt": "no", "reference": ["no no no", "why", "no"]}]
    trainer = made(tmp_path, objective, rows, num_train_epochs=1, per_device_train_batch_size=8)
    assert sorted(seen_references(trainer)) == sorted(["why no", "yes", "no no no", "why", "no"])


def test_more_references_than_a_group_has_rows_take_turns(tmp_path):
    many = ["why", "no", "yes", "no no", "why why", "yes yes"]
    trainer = made(tmp_path, MIXED, [{"prompt": "yes", "reference": many}] * 2, max_steps=3, shuffle_dataset=False)
    seen = seen_references(trainer)
    assert set(seen) == set(many) and len(seen) == 3 * 2 * 4


def conversation(row):
    return {"prompt": [{"role": "user", "content": row["prompt"]}],
            "reference": [{"role": "assistant", "content": row["reference"]}]}


@pytest.mark.parametrize("objective", [ALONE, MIXED])
def test_conversations_and_completions_are_what_texts_are(tmp_path, objective):
    """Prompts as messages, references as messages or texts, and prompt-completion data: the same losses and weights."""
    template = tiny_tokenizer(3)
    template.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    forms = {"text": POSTS, "completion": [{"prompt": row["prompt"], "completion": row["reference"]} for row in POSTS],
             "messages": [conversation(row) for row in POSTS],
             "message, text": [conversation(row) | {"reference": row["reference"]} for row in POSTS],
             "text, message": [row | {"reference": conversation(row)["reference"]} for row in POSTS]}
    results = {}
    for name, rows in forms.items():
        trainer = made(tmp_path, objective, rows, tokenizer=template, max_steps=2, seed=5)
        trainer.train()
        results[name] = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    for name, weights in results.items():
        assert torch.equal(weights, results["text"]), name
    assert not torch.equal(results["text"], torch.cat([w.detach().flatten() for w in tiny_policy(3).parameters()]))


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "yes", "reference": ""}, "row 1 of train_dataset: a reference must be a text"),
    ({"prompt": "yes", "reference": None}, "row 1 of train_dataset"),
    ({"prompt": None, "reference": "no"}, "row 1 of train_dataset: prompt must be")])
def test_what_cannot_be_a_reference_is_told_before_a_model_is_touched(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, MIXED, [POSTS[0], row], model="no/such-model")


# --- what is read: the prompt as in sampling, the reference whole


def test_a_long_reference_is_whole_and_its_prompt_as_sampled(tmp_path):
    row = {"prompt": "yes no " * 6, "reference": "why " * 15}
    trainer = made(tmp_path, MIXED, [row] * 2)
    ids, labels = trainer._reference_pairs([row], 4)[0]
    prompt = trainer._tokenize_prompts([row["prompt"]])[0][0]
    assert ids == prompt + [3] * 15 + [END] and labels == [-100] * 12 + [3] * 15 + [END]


def test_what_does_not_fit_is_cut_without_an_end_and_said(tmp_path):
    row = {"prompt": "yes no", "reference": "why no yes"}
    trainer = made(tmp_path, ALONE, [row, POSTS[1]], max_steps=1, trainer={"max_length": 4})
    with pytest.warns(UserWarning, match="longer than max_length=4 .*reference_cut_share"):
        assert trainer._reference_pairs([row], 1)[0] == ([1, 2, 3, 2], [-100, -100, 3, 2])
    trainer._metrics["train"].clear()
    trainer.train()
    assert logged(trainer, "reference_cut_share") == [0.5]
    long = {"prompt": "yes no yes no", "reference": "why"}
    with pytest.raises(ValueError, match="a prompt of 4 tokens leaves no room"):
        trainer._reference_pairs([long], 1)


@pytest.mark.parametrize("given", [None, 512])
def test_the_context_is_the_limit_whatever_is_given(tmp_path, given):
    trainer = made(tmp_path, ALONE, trainer={"max_length": given})
    assert trainer.max_length == 32  # tiny_policy's positions
    with pytest.warns(UserWarning, match="max_length=32"):
        assert len(trainer._reference_pairs([{"prompt": "yes", "reference": "no " * 50}], 1)[0][0]) == 32


def test_an_end_token_in_the_text_is_not_trained_twice(tmp_path):
    trainer = made(tmp_path, ALONE)
    plain, ended = (trainer._reference_pairs([{"prompt": "yes", "reference": text}], 1) for text in ("no", "no <end>"))
    assert plain == ended == [([1, 2, END], [-100, 2, END])]


# --- TRL's and transformers' settings


def test_group_terms_come_every_nth_round_also_with_several_iterations(tmp_path):
    trainer = made(tmp_path, MIXED, max_steps=8, num_iterations=2, trainer={"policy_every": 2})
    trainer.train()
    sampled = ["reward" in entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry.get("policy_loss") is not None for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [True, True, False, False] * 2 and sampled[0] and not any(sampled[2:4]) and sampled[4]


@pytest.mark.parametrize("advantage", ["group", "leave_one_out", "max_at_k"])
def test_the_table_of_completions_shows_what_is_trained_with(tmp_path, advantage):
    trainer = made(tmp_path, Objective(0, 0.5, 0.2), max_steps=1, log_completions=True,
                   trainer={"advantage": advantage})
    output, original = {}, trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: output.update(original(inputs)) or dict(output)
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    np.testing.assert_allclose(sorted(table["advantage"]), sorted(output["advantages"].tolist()), atol=1e-6)


def advantages_of(trainer, rewards):
    """Of four replies to one prompt with `rewards`, (4,) or (4, F); nothing is sampled anew."""
    trainer._scored = torch.as_tensor(rewards).reshape(4, -1), ["yes", "no", "why", "no no"]
    return trainer._combined_advantages(torch.zeros(4), 4).numpy()


@pytest.mark.parametrize("advantage", ["leave_one_out", "max_at_k"])
def test_scale_rewards_and_aggregation_count_with_every_advantage(tmp_path, advantage):
    from grpo_engage.train.advantages import reward_advantages, scaled_credit

    rewards = np.array([[0.1, 4.0], [0.3, 1.0], [0.9, 2.0], [0.4, 3.0]])

    def given(**changes):
        trainer = made(tmp_path, GRPO, rewards=[whys, whys], trainer={"advantage": advantage}, **changes)
        return advantages_of(trainer, rewards)

    summed = reward_advantages(rewards.sum(axis=1)[None], advantage)
    np.testing.assert_allclose(given(scale_rewards="none"), summed[0], atol=1e-5)
    np.testing.assert_allclose(given(scale_rewards="batch"), scaled_credit(summed)[0], atol=1e-5)
    normal = ((rewards - rewards.mean(0)) / (rewards.std(0, ddof=1) + 1e-4)).sum(axis=1)
    np.testing.assert_allclose(given(scale_rewards="none", multi_objective_aggregation="normalize_then_sum"),
                               reward_advantages(normal[None], advantage)[0], atol=1e-4)
    with pytest.warns(UserWarning, match="scale_rewards='group'"):
        ReplyTrainer(tiny_policy(3), whys, GRPOConfig(str(tmp_path), **SETTINGS), Dataset.from_list(POSTS),
                     processing_class=tiny_tokenizer(3), advantage=advantage)


@pytest.mark.parametrize("advantage", ["leave_one_out", "max_at_k"])
def test_rewards_of_none_and_one_reply_in_evaluation(tmp_path, advantage):
    def silent(completions, **_):
        return [None if place % 4 == 0 else float(len(text)) for place, text in enumerate(completions)]

    trainer = made(tmp_path, GRPO, rewards=silent, max_steps=1, evaluated=Dataset.from_list(POSTS),
                   num_generations_eval=1,
                   trainer={"advantage": advantage, "max_k": 3 if advantage == "max_at_k" else None})
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    only = advantages_of(made(tmp_path, GRPO, trainer={"advantage": advantage}), [np.nan, 0.1, 0.5, 0.2])
    assert only[0] == 0 and only[2] > 0


@pytest.mark.parametrize("objective", [GRPO, MIXED])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_entropy_bonus_leaves_one_policy_loss(tmp_path, objective, accumulation):
    settings = {"max_steps": 1, "per_device_train_batch_size": 8 // accumulation, "loss_type": "grpo",
                "gradient_accumulation_steps": accumulation, "seed": 4}
    plain, bonus = (made(tmp_path, objective, entropy_coef=coefficient, **settings) for coefficient in (0.0, 0.1))
    for trainer in (plain, bonus):
        trainer.train()
    assert logged(bonus, "policy_loss") == pytest.approx(logged(plain, "policy_loss"), abs=1e-6)
    supervised = objective.alpha * logged(bonus, "supervised_loss")[0] if objective.alpha else 0.0
    assert logged(bonus, "loss")[0] < logged(bonus, "policy_loss")[0] + supervised - 0.02


@pytest.mark.parametrize("setting", [{"label_smoothing_factor": 0.2}, {"neftune_noise_alpha": 5.0}])
def test_supervised_settings_of_transformers_are_those_of_sft(tmp_path, setting):
    """One step beside TRL's SFTTrainer with the same setting: the same gradients, and others than without it."""
    gradients = {}
    for name, changes in (("sft", setting), ("ours", setting), ("without", {})):
        settings = {key: value for key, value in SETTINGS.items() if key != "max_completion_length"} | {
            "max_steps": 1, "per_device_train_batch_size": 5, "max_grad_norm": 0.0} | changes
        model, tokenizer = tiny_policy(3).float(), tiny_tokenizer(3)
        if name == "sft":
            rows = Dataset.from_list([{"prompt": row["prompt"], "completion": " " + row["reference"]} for row in POSTS])
            trainer = SFTTrainer(model, SFTConfig(str(tmp_path), completion_only_loss=True, shuffle_dataset=False,
                                                  train_sampling_strategy="sequential", **settings),
                                 train_dataset=rows, processing_class=tokenizer)
        else:
            trainer = made(tmp_path, ALONE, model=model, tokenizer=tokenizer, shuffle_dataset=False, **settings)
        trainer.remove_callback(PrinterCallback)
        torch.manual_seed(0)
        caught = []
        trainer.optimizer = None
        original = trainer.training_step

        def noting(*arguments, original=original, caught=caught, trainer=trainer):
            torch.manual_seed(1)
            loss = original(*arguments)
            caught.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
            return loss

        trainer.training_step = noting
        trainer.train()
        gradients[name] = caught[0]
    torch.testing.assert_close(gradients["ours"], gradients["sft"], rtol=1e-4, atol=1e-6)
    assert (gradients["ours"] - gradients["without"]).abs().max() > 1e-4


def moe():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=1, head_dim=4,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=1, eos_token_id=END,
        pad_token_id=END, bos_token_id=None, router_aux_loss_coef=0.0))


def test_a_mixture_of_experts_gets_its_balancing_loss(tmp_path):
    losses = {}
    for coefficient in (None, 0.5):
        trainer = made(tmp_path, ALONE, model=moe(), max_steps=1, per_device_train_batch_size=5,
                       router_aux_loss_coef=coefficient)
        trainer.train()
        losses[coefficient] = logged(trainer, "loss")[0]
        table = trainer._references(POSTS, 1)
    output = moe()(input_ids=table["reference_ids"], attention_mask=table["reference_mask"], output_router_logits=True)
    assert losses[0.5] - losses[None] == pytest.approx(0.5 * float(output.aux_loss.detach()), abs=2e-3)


# --- the KL term's reference


def changed_policy():
    model = tiny_policy(3).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("named", [False, True])
def test_kl_of_a_full_model_is_to_the_weights_it_starts_with(tmp_path, named):
    model = changed_policy()
    if named:  # it was loaded from a folder that holds other weights
        tiny_policy(3).float().save_pretrained(tmp_path / "original")
        model.config._name_or_path = str(tmp_path / "original")
    trainer = made(tmp_path, GRPO, model=model, max_steps=3, learning_rate=0.05, trainer={"kl_weight": 0.1})
    for ours, theirs in zip(model.state_dict().values(), trainer.ref_model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    trainer.train()
    kl = logged(trainer, "kl")
    assert abs(kl[0]) < 1e-6 < kl[-1]
    assert model.config._name_or_path == (str(tmp_path / "original") if named else "")


def test_kl_with_another_active_adapter_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = get_peft_model(tiny_policy(3).float(), config)
    model.add_adapter("mine", config)
    model.set_adapter("mine")
    with pytest.raises(ValueError, match="adapter 'default', but 'mine' is active"):
        made(tmp_path, GRPO, model=model, trainer={"kl_weight": 0.1})
    made(tmp_path, GRPO, model=model, max_steps=1).train()  # without a KL term it is nobody's business


# --- evaluation


@pytest.mark.parametrize("size", [1, 2, 8])
def test_eval_loss_is_the_nll_per_token_whatever_the_batches(tmp_path, size):
    trainer = made(tmp_path, ALONE, evaluated=Dataset.from_list(POSTS), per_device_eval_batch_size=size)
    losses = trainer.evaluate()
    tokens, total = 0, 0.0
    for row in POSTS:
        ids, labels = trainer._reference_pairs([row], 1)[0]
        logp = trainer.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        kept = [(place, label) for place, label in enumerate(labels[1:]) if label != -100]
        tokens, total = tokens + len(kept), total - sum(float(logp[place, label].detach()) for place, label in kept)
    assert losses["eval_loss"] == pytest.approx(total / tokens, abs=1e-6)
    assert losses["eval_supervised_loss"] == pytest.approx(total / tokens, abs=1e-6)


def test_evaluation_sets_without_references_are_refused_early(tmp_path):
    without = Dataset.from_dict({"prompt": ["yes"]})
    for evaluated in (without, {"easy": Dataset.from_list(POSTS), "hard": without}):
        with pytest.raises(ValueError, match="'reference'.* in eval_dataset"):
            made(tmp_path, ALONE, evaluated=evaluated, model="no/such-model")
    with pytest.raises(ValueError, match="in eval_dataset"):
        made(tmp_path, MIXED).evaluate(without)


def test_a_nan_in_evaluation_is_seen_in_the_log(tmp_path):
    trainer = made(tmp_path, MIXED, evaluated=Dataset.from_list(POSTS), per_device_eval_batch_size=4)
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight.fill_(float("nan"))
    trainer._generate = lambda prompts: ([[1]] * len(prompts), [[2, END]] * len(prompts), None, ["no"] * len(prompts),
                                         None, {}, None, None)
    assert math.isnan(trainer.evaluate()["eval_loss"])


# --- models, columns, cards


def test_prompt_tuning_and_unused_columns(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rows = [row | {"author": "somebody"} for row in POSTS]
    trainer = made(tmp_path, ALONE, rows, model=tiny_policy(3).float(), peft_config=config, max_steps=2,
                   learning_rate=0.1, remove_unused_columns=True)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()
              if weight.requires_grad}
    trainer.train()
    assert before and all(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters()
                          if name in before)


def test_reward_weights_do_not_matter_where_nobody_judges(tmp_path):
    made(tmp_path, Objective(0, 0, 1), rewards=[whys, whys], reward_weights=[1.0, 2.0], max_steps=1).train()
    made(tmp_path, ALONE, rewards=None, reward_weights=[1.0, 2.0], max_steps=1).train()


@pytest.mark.parametrize(("objective", "said"), [
    (ALONE, "trained with SFT."), (GRPO, "trained with GRPO, a method"),
    (Objective(0.3, 0.5, 0.2), "trained with 0.3 x SFT + 0.5 x GRPO + 0.2 x diversity of generations.")])
def test_the_model_card_says_how_it_was_trained(tmp_path, objective, said):
    trainer = made(tmp_path, objective)
    trainer.create_model_card(model_name="mine")
    assert said in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("changes", "settings", "message"), [
    ({"num_iterations": 2}, {"objective": ALONE}, "num_iterations=2 uses samples again"),
    ({}, {"objective": GRPO, "trainer": {"max_k": 0}}, "max_k must be a whole number"),
    ({}, {"objective": GRPO, "trainer": {"policy_every": 1.5}}, "policy_every must be a whole number"),
    ({}, {"objective": GRPO, "trainer": {"kl_weight": -1.0}}, "kl_weight must be a finite number"),
    ({"entropy_coef": 0.1, "loss_type": "dr_grpo"},
     {"objective": GRPO, "trainer": {"exact": True, "advantage": "leave_one_out"}}, "exact needs entropy_coef=0"),
    ({}, {"objective": GRPO, "rewards": None, "model": None}, "No reward source provided")])
def test_contradictions_are_told_at_construction(tmp_path, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **{"model": "no/such-model"} | settings, **changes)


def test_batches_are_free_where_nothing_is_sampled(tmp_path):
    made(tmp_path, ALONE, per_device_train_batch_size=1, per_device_eval_batch_size=3, eval_strategy="steps",
         eval_steps=1, max_steps=1, evaluated=Dataset.from_list(POSTS)).train()
    with pytest.raises(ValueError, match="generates=False is for beta = lam = 0"):
        ReplyTrainer("no/such-model", whys, ReplyConfig(str(tmp_path), generates=False, **SETTINGS),
                     Dataset.from_list(POSTS))
