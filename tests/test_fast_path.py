"""A post read once for all its replies changes nothing; and what the fast path does not know goes the plain way."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig

from grpo_engage.policy import sampling, shared_prefix
from grpo_engage.policy.decoding import merged_adapters, sample_completions
from grpo_engage.policy.sampling import format_prompt, generate_replies, load_policy
from grpo_engage.policy.shared_prefix import completion_log_probs, inner_model, labelled_log_probs, takes_fast_path
from grpo_engage.studies.enumeration import EnumeratedTrainer, relative_error
from grpo_engage.train.fast_path import FastGRPOTrainer
from grpo_engage.train.objective import Objective
from grpo_engage.train.trainer import ReplyTrainer


@pytest.fixture(scope="module")
def nano(base):
    return load_policy(base)


SIZES = dict(vocab_size=211, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=211, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0,
                                               embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=1)),
}


def made(family, lora, seed):
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # far from uniform
    if not lora:
        return model.train()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.train()


def rows(seed, posts=5, n=17, prompt=12, reply=9):
    """A step's rows in random order: prompts of mixed length padded on the left, replies on the right, some masked."""
    random = np.random.default_rng(seed)
    lengths, which = random.integers(1, prompt + 1, posts), random.integers(0, posts, n)
    table = random.integers(1, 211, (posts, prompt))
    mask = np.arange(prompt) >= prompt - lengths[:, None]
    ends = random.integers(0, reply + 1, n)
    own = np.arange(reply) < ends[:, None]
    ids = random.integers(1, 211, (n, reply))
    return tuple(torch.as_tensor(value).long() for value in (
        np.where(mask, table, 0)[which], mask[which], np.where(own, ids, 0), own))


def plain(model, prompts, mask, replies, own, temperature):
    whole = torch.cat([mask, own], dim=1)
    logits = model(input_ids=torch.cat([prompts, replies], dim=1), attention_mask=whole,
                   position_ids=(whole.cumsum(1) - 1).clamp(min=0)).logits[:, prompts.shape[1] - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, replies[..., None])[..., 0] * own, entropy.detach() * own


def gradients(model, values, weights):
    model.zero_grad()
    (values * weights).sum().backward()
    return torch.cat([weight.grad.ravel() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_plain_pass(family, lora, seed, monkeypatch):
    """Also in many small passes."""
    monkeypatch.setattr(shared_prefix, "TOKENS_AT_ONCE", 0.2 + 5 * seed)  # a model 48 wide takes a hundred times that
    model = made(family, lora, seed)
    prompts, mask, replies, own = rows(seed)
    weights = torch.randn(replies.shape)
    for temperature in (1.0, 0.6):
        expected, entropy = plain(model, prompts, mask, replies, own, temperature)
        logp, own_entropy, _ = completion_log_probs(inner_model(model), prompts, mask, replies, own, temperature)
        assert (logp - expected).abs().max() < 1e-4 and (own_entropy - entropy).abs().max() < 1e-4
        theirs, ours = gradients(model, expected, weights), gradients(model, logp, weights)
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_references_by_length_are_those_of_the_plain_pass(family, monkeypatch):
    monkeypatch.setattr(shared_prefix, "TOKENS_AT_ONCE", 0.3)
    model = made(family, True, 3)
    random = np.random.default_rng(3)
    lengths = random.integers(0, 15, 12)
    ids = torch.as_tensor(random.integers(1, 211, (12, 14)))
    mask = torch.as_tensor(np.arange(14) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(14) < torch.as_tensor(random.integers(1, 6, (12, 1)))), -100)
    logp, _, right = labelled_log_probs(inner_model(model), ids, mask, labels)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    known = labels[:, 1:] != -100
    expected = logits[known].log_softmax(-1).gather(-1, labels[:, 1:][known][:, None])[:, 0]
    assert len(logp) == int(known.sum()) > 20 and logp.sum().item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert int(right.sum()) == int((logits[known].argmax(-1) == labels[:, 1:][known]).sum())
    theirs, ours = gradients(model, expected, 1.0), gradients(model, logp, 1.0)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_log_prob_that_they_were_drawn_with(family):
    """By the plain pass with the adapter beside; what ends leaves the batch, and the base's weights stay to the bit."""
    model = made(family, True, 4).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random = np.random.default_rng(4)
    posts = [random.integers(1, 211, length).tolist() for length in (3, 11, 1)]
    prompts = [posts[place] for place in random.integers(0, 3, 40)]
    with merged_adapters(model):
        drawn, sums = sample_completions(inner_model(model), prompts, range(100, 140), 8, 0.8)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert len({len(one) for one in drawn}) > 3
    for prompt, one, total in zip(prompts, drawn, sums.tolist(), strict=True):
        logits = model(torch.tensor([prompt + one])).logits[0, len(prompt) - 1 : -1] / 0.8
        assert logits.log_softmax(-1)[range(len(one)), one].sum().item() == pytest.approx(total, abs=1e-3)
        assert all(token not in range(100, 140) for token in one[:-1])
        assert len(one) == 8 or one[-1] in range(100, 140)


def test_replies_come_as_often_as_by_generate(nano):
    """First letters of 1,500 replies to two posts, by both ways; the same seed gives the same replies."""
    model, tokenizer = nano
    posts = ["The trains are late again 😀 Why?", "¿Quién más hornea pan?"]
    ours = generate_replies(model, tokenizer, posts, n=1500, max_new_tokens=2, batch_size=500, label="")
    assert ours.equals(generate_replies(model, tokenizer, posts, n=1500, max_new_tokens=2, batch_size=500, label=""))
    slow = load_policy(model.config._name_or_path, fast_path=False)[0]
    theirs = generate_replies(slow, tokenizer, posts, n=1500, max_new_tokens=2, batch_size=500, label="")
    for post in (0, 1):
        one, other = (table[table["post"] == post]["text"].str[:1].str.lower().value_counts()
                      for table in (ours, theirs))
        common = [text for text in one.index if one[text] + other.get(text, 0) >= 60]
        counts = np.array([[table.get(text, 0) for text in common] for table in (one, other)])
        counts = np.column_stack([counts, 1500 - counts.sum(axis=1)])
        expected = np.broadcast_to(counts.sum(axis=0) / 2, counts.shape)
        assert len(common) >= 3 and chisquare(counts.ravel(), expected.ravel(), ddof=counts.shape[1]).pvalue > 1e-3


def test_the_plain_way_is_a_setting_and_its_bytes_are_generates(nano, monkeypatch):
    model, tokenizer = nano
    slow = load_policy(model.config._name_or_path, fast_path=False)[0]
    monkeypatch.setattr(sampling, "sample_completions", None)  # calling it would raise
    assert len(generate_replies(slow, tokenizer, ["storm"], n=3, max_new_tokens=5, label="")) == 3
    with pytest.raises(TypeError):
        generate_replies(model, tokenizer, ["storm"], n=3, max_new_tokens=5, label="")


def test_what_it_does_not_know_goes_the_plain_way_with_one_line(capsys):
    window = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    window.config._name_or_path = "a model with windows"
    ids = torch.randint(1, 211, (2, 6))
    shared_prefix.say_plain.cache_clear()
    assert not any(takes_fast_path(window, ids, torch.ones_like(ids)) for _ in range(3))
    assert capsys.readouterr().out.count("a model with windows: posts are read once for each reply") == 1


def test_a_trainer_with_settings_that_it_does_not_know_says_so(base, tmp_path, capsys):
    model, tokenizer = load_policy(base)
    shared_prefix.say_plain.cache_clear()
    trainer = ReplyTrainer(
        model, lambda completions, **_: [0.0] * len(completions),
        GRPOConfig(str(tmp_path), entropy_coef=0.1, num_generations=2, per_device_train_batch_size=2, bf16=False,
                   use_cpu=True, report_to="none"),
        Dataset.from_dict({"prompt": ["storm"]}), processing_class=tokenizer, objective=Objective(0, 1, 0))
    assert "posts are read once for each reply" in capsys.readouterr().out and not trainer._inner.fast_path


def test_a_model_that_it_misreads_is_found_out_at_first_use(capsys):
    class Halved(LlamaForCausalLM):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits = output.logits / 2
            return output

    model = Halved(LlamaConfig(**SIZES))
    model.config._name_or_path = "a model of its own"
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    ids = torch.randint(1, 211, (2, 6))
    shared_prefix.say_plain.cache_clear()
    assert not takes_fast_path(model, ids, torch.ones_like(ids))
    assert "changes log-probs" in capsys.readouterr().out


@pytest.mark.parametrize("objective", [Objective(0, 1, 0), Objective(0.3, 0.5, 0.2), Objective(1, 0, 0)])
def test_a_step_of_training_is_that_of_the_plain_way(base, pairs, tmp_path, objective):
    """The same sampled replies go into both; loss, logged numbers and gradients agree, with KL and masked replies."""
    results, samples = [], []
    for fast in (False, True):
        model, tokenizer = load_policy(base)
        table = pairs.drop_duplicates("tweet").head(8)
        data = Dataset.from_dict({"prompt": [format_prompt(post, tokenizer) for post in table["tweet"]],
                                  "reference": table["reply"].tolist()})
        arguments = GRPOConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=16,
                               num_generations=4, max_completion_length=10, bf16=False, use_cpu=True, report_to="none",
                               gradient_checkpointing=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
                               learning_rate=1e-9, max_grad_norm=0.0)
        trainer = ReplyTrainer(
            model, lambda completions, **_: [float(len(text)) for text in completions] if objective.beta else None,
            arguments, data, processing_class=tokenizer, objective=objective, kl_weight=0.05 if objective.beta else 0.0,
            peft_config=LoraConfig(r=4, target_modules="all-linear"), cut_replies="mask", fast_path=fast)
        torch.manual_seed(0)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        single, seen = trainer._generate_single_turn, {}
        if samples:
            trainer._generate_single_turn = lambda *_, **__: (samples[0], None)
        else:
            trainer._generate_single_turn = lambda *given, single=single, **named: samples.append(
                (out := single(*given, **named))[0]) or out
        backward = trainer.accelerator.backward

        def keep(loss, backward=backward, trainer=trainer, seen=seen, **named):
            backward(loss, **named)
            seen.update({name: weight.grad.clone() for name, weight in trainer.model.named_parameters()
                         if weight.grad is not None})

        trainer.accelerator.backward = keep
        trainer.train()
        assert seen
        results.append((trainer.state.log_history[0], seen))
    (stock_log, theirs), (log, ours) = results
    for name in {"loss", "entropy", "kl", "supervised_loss", "mean_token_accuracy", "policy_loss"} & stock_log.keys():
        assert log[name] == pytest.approx(stock_log[name], rel=1e-4, abs=1e-5), name
    total = sum(float((gradient**2).sum()) for gradient in theirs.values())
    assert sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs) < 1e-8 * total


# ---- the expected gradient, by enumeration, with the replies of a group on one reading of their post -----------------


class SharedEnumeration(EnumeratedTrainer):
    """The enumerated trainer, whose log-probs come through the fast path in place of its plain float64 pass."""

    shared = 0

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *others, **named):
        exact, self.exact = self.exact, False
        try:
            logp, *rest = FastGRPOTrainer._get_per_token_logps_and_entropies(
                self, model, input_ids, attention_mask, logits_to_keep, *others, **named)
        finally:
            self.exact = exact
        assert logp.dtype == torch.float64
        if self.row_weights is not None and logp.requires_grad:
            weights = self.row_weights
            logp.register_hook(lambda arriving: arriving * weights[:, None])
        return logp, *rest


@pytest.mark.parametrize("objective, settings", [
    (Objective(0, 1, 0), {}), (Objective(0.3, 0.5, 0.2), {}),
    (Objective(0, 1, 0), {"advantage": "max_at_k", "max_k": 2}),
    (Objective(0.3, 0.5, 0.2), {"posts": 2, "length": 1})], ids=["grpo", "hybrid", "max_at_k", "hybrid, two posts"])
def test_the_expected_gradient_is_the_exact_one_through_the_fast_path(objective, settings, monkeypatch):
    passes = []
    inside = shared_prefix.completion_log_probs
    monkeypatch.setattr(shared_prefix, "completion_log_probs", lambda *given: passes.append(1) or inside(*given))
    settings = {"words": 2, "length": 2, "k": 2, "trainer_class": SharedEnumeration} | settings
    error = relative_error(objective, **settings)
    assert error < 1e-12 and len(passes) > 5

    def steeper(*given):  # a thousandth too much, where the comparison at first use does not see it
        logp, *rest = inside(*given)
        return logp * 1.001 if torch.is_grad_enabled() else logp, *rest

    monkeypatch.setattr(shared_prefix, "completion_log_probs", steeper)
    assert relative_error(objective, **settings) > 1e-4
