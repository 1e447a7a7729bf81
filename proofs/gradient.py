"""The expected gradient of ReplyTrainer, by enumeration, against the exact gradient of the objective.

A policy so small that everything it can say is listed: 3 tokens (one ends a reply, and pads), replies of at most 2 or 3
tokens, groups of K = 2 or 3, float64. For every possible group the real path runs (scoring, advantages, shuffling,
splitting into micro-batches, `_compute_loss`, backward); only sampling is replaced by the group's turn. The gradients,
weighted by the groups' probabilities, are compared with autograd through the sum over all groups.

    python proofs/gradient.py      # the full grid -> proofs/gradient.csv
"""

import csv
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from grpo_engage.diversity import set_diversity
from grpo_engage.grpo_trainer import Objective, ReplyTrainer

END, WORDS = 0, 2
METRICS = ("self_bleu", "distinct_n", "cosine", "vendi", "arbitrary")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Three tokens: the end (also padding), and two words."""
    inner = Tokenizer(WordLevel({"<end>": END, "yes": 1, "no": 2}, unk_token="<end>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>", padding_side="left")


def tiny_policy(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    # GPT-2, because Llama's norms and softmax go through float32 whatever the model's dtype is
    config = GPT2Config(vocab_size=1 + WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=32, eos_token_id=END,
                        pad_token_id=END, bos_token_id=END, initializer_range=0.7, attn_implementation="eager",
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return GPT2LMHeadModel(config).double().train()


def everything(length: int) -> list[tuple[int, ...]]:
    """All replies of at most `length` tokens: ended by the end token, or cut off."""
    words = range(1, 1 + WORDS)
    ended = [(*start, END) for n in range(length) for start in product(words, repeat=n)]
    return ended + list(product(words, repeat=length))


def table_embedder(texts) -> np.ndarray:
    """Unit vectors drawn once for each text: what MiniLM does, without MiniLM."""
    rows = [np.random.default_rng([len(text), *text.encode()]).normal(size=3) for text in texts]
    return np.array([row / np.linalg.norm(row) for row in rows])


def metric_function(name: str):
    if name in ("self_bleu", "distinct_n"):
        return name
    if name in ("cosine", "vendi"):
        return lambda texts: set_diversity(texts, name, embedder=table_embedder)
    # no structure at all: a number for each multiset
    return lambda texts: 0.0 if len(texts) < 2 else float(
        np.random.default_rng(list(" | ".join(sorted(texts)).encode())).random())


class Enumerated(ReplyTrainer):
    """ReplyTrainer whose next completions are given, not sampled."""

    def say_next(self, group) -> None:
        self.given = [list(reply) for reply in group]

    def _generate(self, prompts):
        ids = self._tokenizer(list(prompts))["input_ids"]
        texts = self._tokenizer.batch_decode(self.given, skip_special_tokens=True)
        return ids, self.given, None, texts, None, {}, None, None

    def backward_of(self, rows, weight: float) -> float:
        """Add `weight` times what backward leaves for one step on `rows` to the gradients; return the loss."""
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # the training loop sets it
        batch = shuffle_sequence_dict(self._generate_and_score_completions(rows))
        total = 0.0
        for part in split_tensor_dict(batch, self.args.steps_per_generation):
            loss = self._compute_loss(self.model, part)
            (loss * weight).backward()
            total += loss.item()
        return total


def make(length: int, k: int, objective: Objective, accumulation: int = 1, **settings) -> Enumerated:
    names = everything(length)
    # eighths: TRL keeps rewards in float32, where these are exact
    values = np.random.default_rng(3).integers(0, 9, size=len(names)) / 8
    table = dict(zip(names, values.tolist(), strict=True))

    def reward(completion_ids, **_):
        return [table[tuple(ids)] for ids in completion_ids]

    loss_type = settings.pop("loss_type", "dr_grpo")
    arguments = GRPOConfig(
        tempfile.mkdtemp(prefix="grpo_engage_proof_"), num_generations=k, per_device_train_batch_size=k // accumulation,
        gradient_accumulation_steps=accumulation, max_completion_length=length, bf16=False, use_cpu=True,
        gradient_checkpointing=False, loss_type=loss_type, temperature=1.0, report_to="none",
        beta=settings.pop("trl_beta", 0.0))
    rows = Dataset.from_dict({"prompt": ["yes no"], "reference": ["no no yes"]})
    trainer = Enumerated(tiny_policy(), [reward], arguments, rows, processing_class=tiny_tokenizer(),
                         objective=objective, **settings)
    trainer.table = table
    return trainer


def log_probabilities(model, replies, prompt=(1, 2)) -> torch.Tensor:
    """log pi(reply | prompt) of each reply, by a plain forward pass."""
    sums = []
    for reply in replies:
        ids = torch.tensor([[*prompt, *reply]])
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)].sum())
    return torch.stack(sums)


def gradient(value: torch.Tensor, model) -> torch.Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for g, p in zip(parts, model.parameters(), strict=True)])


def expected(trainer: Enumerated, length: int, k: int) -> torch.Tensor:
    """Sum over all groups of P(group) times what backward leaves."""
    replies = everything(length)
    with torch.no_grad():
        probability = log_probabilities(trainer.model, replies).exp().tolist()
    assert abs(sum(probability) - 1) < 1e-12
    trainer.model.zero_grad()
    row = {"prompt": "yes no", "reference": "no no yes"}
    for group in product(range(len(replies)), repeat=k):
        trainer.say_next([replies[i] for i in group])
        trainer.backward_of([row] * k, float(np.prod([probability[i] for i in group])))
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in trainer.model.parameters()])


def exact(trainer: Enumerated, length: int, k: int, objective: Objective, max_k: int | None, metric) -> torch.Tensor:
    """Gradient of alpha * NLL - beta * E[max of max_k rewards] (None: mean reward) - lam * E[D], through all groups."""
    replies = everything(length)
    logp = log_probabilities(trainer.model, replies)
    texts = tiny_tokenizer().batch_decode([list(reply) for reply in replies], skip_special_tokens=True)
    value = -log_probabilities(trainer.model, [(2, 2, 1, END)])[0] / 4 * objective.alpha  # mean over 4 tokens
    if objective.beta:
        for group in product(range(len(replies)), repeat=max_k or 1):
            best = max(trainer.table[replies[i]] for i in group)
            value = value - objective.beta * best * logp[list(group)].sum().exp()
    if objective.lam:
        for group in product(range(len(replies)), repeat=k):
            value = value - objective.lam * set_diversity([texts[i] for i in group], metric) * \
                logp[list(group)].sum().exp()
    return gradient(value, trainer.model)


def relative_error(length: int, k: int, objective: Objective, advantage: str = "leave_one_out", max_k=None,
                   metric: str = "self_bleu", accumulation: int = 1, **settings) -> float:
    function = metric_function(metric)
    trainer = make(length, k, objective, accumulation, advantage=advantage, max_k=max_k, diversity_metric=function,
                   **({"exact": True} | settings))
    wanted = exact(trainer, length, k, objective, max_k, function)
    return float((expected(trainer, length, k) - wanted).norm() / wanted.norm())


def grid(lengths=(2, 3), sizes=(2, 3)):
    """(name, settings) of every proof in exact mode."""
    for length, k in product(lengths, sizes):
        for accumulation in (1, k):
            common = dict(length=length, k=k, accumulation=accumulation)
            yield "reward", common | dict(objective=Objective(0.0, 1.0, 0.0))
            for max_k in range(1, k + 1):
                yield f"max_at_{max_k}", common | dict(objective=Objective(0.0, 1.0, 0.0), advantage="max_at_k",
                                                       max_k=max_k)
            for metric in METRICS:
                yield f"diversity {metric}", common | dict(objective=Objective(0.0, 0.0, 1.0), metric=metric)
            yield "supervised", common | dict(objective=Objective(1.0, 0.0, 0.0))
            yield "all three", common | dict(objective=Objective(0.3, 0.5, 0.2), metric="arbitrary")
            yield "all three, max_at_k", common | dict(objective=Objective(0.3, 0.5, 0.2), advantage="max_at_k",
                                                       max_k=k, metric="self_bleu")


def biases(length: int = 3, k: int = 2):
    """What the scaled defaults do to the direction: cosine of expected and exact gradient of mean reward."""
    for loss_type in ("dr_grpo", "grpo", "bnpo", "dapo"):
        # a floor above every root mean square: divided by a constant, which is no scaling at all
        for label, settings in (("leave_one_out, unscaled", {"advantage": "leave_one_out", "rms_floor": 1e3}),
                                ("leave_one_out, batch RMS", {"advantage": "leave_one_out"}),
                                ("group", {"advantage": "group"})):
            trainer = make(length, k, Objective(0.0, 1.0, 0.0), loss_type=loss_type, **settings)
            wanted = exact(trainer, length, k, Objective(0.0, 1.0, 0.0), None, None)
            got = expected(trainer, length, k)
            yield loss_type, label, float(got @ wanted / got.norm() / wanted.norm())


def main() -> int:
    folder = Path(__file__).parent
    failed = 0
    with open(folder / "bias.csv", "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["loss_type", "advantage", "cosine_with_exact_gradient"])
        writer.writerows([loss_type, advantage, f"{cosine:.6f}"] for loss_type, advantage, cosine in biases())
    with open(folder / "gradient.csv", "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["term", "max_length", "K", "micro_batches", "relative_error"])
        for name, settings in grid():
            if (settings["length"], settings["k"]) == (3, 3) and settings["accumulation"] > 1:
                continue  # 3375 groups three times over: minutes each, and nothing that K = 2 does not show
            error = relative_error(**settings)
            failed += error >= 1e-8
            writer.writerow([name, settings["length"], settings["k"], settings["accumulation"], f"{error:.1e}"])
            handle.flush()
            print(f"{name:24} length {settings['length']} K {settings['k']} micro-batches {settings['accumulation']} "
                  f"relative error {error:.1e}", flush=True)
    print(f"{failed} of the proofs failed" if failed else "every relative error is below 1e-8")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
