"""The expected gradient of ReplyTrainer, by enumeration, against the exact gradient of the objective.

A policy so small that everything it can say is listed: 3 or 4 tokens (one ends a reply, and pads), replies of at most 2
or 3 tokens, groups of K = 2 or 3, float64 (notebook studies/00_enumeration). For every possible group the real path
runs (scoring, advantages, shuffling, splitting into micro-batches, `_compute_loss`, backward); only sampling
is replaced.

    python proofs/gradient.py             # the full grid -> gradient.csv, formulas.csv, bias.csv beside this file
    python proofs/gradient.py --resume    # goes on with a gradient.csv that was cut off
    python proofs/gradient.py --resume --parts gradient --terms "reward x"    # the rows of these terms alone
"""

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from grpo_engage.studies.enumeration import (
    EnumeratedTrainer,
    exact_gradient,
    expected_gradient,
    groups_of,
    log_probabilities,
    relative_error,
    tiny_metric,
    tiny_policy,
    tiny_trainer,
)
from grpo_engage.text.diversity import DIVERSITY_METRICS, set_diversity
from grpo_engage.train.objective import Objective

REWARD, DIVERSITY, SUPERVISED = Objective(0.0, 1.0, 0.0), Objective(0.0, 0.0, 1.0), Objective(1.0, 0.0, 0.0)
ALL = Objective(0.3, 0.5, 0.2)
METRICS = (*DIVERSITY_METRICS, "arbitrary")
# one group a step: as training runs it, nothing weighted but the loss; several: large grids, see the notebook
SMALL = (dict(words=2, length=2, k=2), dict(words=2, length=2, k=3), dict(words=2, length=3, k=2))
LARGE = (dict(words=2, length=3, k=3), dict(words=3, length=2, k=2), dict(words=3, length=2, k=3),
         dict(words=3, length=3, k=2), dict(words=3, length=3, k=3))
KAPPA = 0.1
COLUMNS = ("term", "vocabulary", "max_length", "K", "posts", "micro_batches", "groups_per_step", "groups",
           "relative_error")


def terms(k: int):
    """(name, settings) of every term of the objective, and of sums of all."""
    yield "reward", dict(objective=REWARD)
    for max_k in range(1, k + 1):
        yield f"max_at_{max_k}", dict(objective=REWARD, advantage="max_at_k", max_k=max_k)
    for metric in METRICS:
        yield f"diversity {metric}", dict(objective=DIVERSITY, metric=metric)
    for metric in METRICS:
        yield f"reward x {metric}", dict(objective=REWARD, metric=metric, diversity_form="product")
    yield "supervised", dict(objective=SUPERVISED)
    yield "all three", dict(objective=ALL, metric="arbitrary")
    yield "all three, max_at_k", dict(objective=ALL, advantage="max_at_k", max_k=k, metric="self_bleu")


def grid(small=SMALL, large=LARGE, two_posts: bool = True):
    """(name, settings) of every proof in exact mode; the settings are those of `relative_error`."""
    for shape in small:
        for micro_batches in (1, shape["k"]):
            for name, settings in terms(shape["k"]):
                first = shape == SMALL[0] and micro_batches == 1  # once in every order, as ordered groups
                yield name, shape | dict(micro_batches=micro_batches, ordered=first) | settings
    if two_posts:
        # two posts: prompts and references of different lengths, micro-batches with other reference tokens or none
        for name, settings in terms(2):
            yield name, SMALL[0] | dict(posts=2, micro_batches=4, groups_per_step=28) | settings
        yield "supervised", SMALL[0] | dict(posts=2, micro_batches=2, objective=SUPERVISED)
        yield "all three", SMALL[0] | dict(posts=2, micro_batches=2, objective=ALL, metric="arbitrary")
    for shape in large:
        for micro_batches in (1, 2):
            for name, settings in terms(shape["k"]):
                yield name, shape | dict(micro_batches=micro_batches, groups_per_step=512) | settings


class NumberSubtracted(EnumeratedTrainer):
    """The earlier system: lam * D(group), a number, is subtracted from the loss."""

    number = 0.0

    def _compute_loss(self, model, inputs):
        texts = self._tokenizer.batch_decode(self.given, skip_special_tokens=True)
        return super()._compute_loss(model, inputs) - self.number * set_diversity(texts)


def constant_number_error(number: float = 1000.0) -> float:
    """Norm of what subtracting `number` * D adds to the gradient, the largest over all groups; D itself varies."""
    trainer = tiny_trainer(REWARD, advantage="leave_one_out", exact=True, trainer_class=NumberSubtracted)
    largest, size, losses = 0.0, 0.0, []
    for group in groups_of(len(trainer.replies), 2)[0]:
        gradients = []
        for trainer.number in (0.0, number):
            trainer.model.zero_grad()
            torch.manual_seed(0)  # the same order in the batch: the same sums in the same order
            losses.append(trainer.backward_of([[trainer.replies[i] for i in group]]))
            gradients.append(trainer.left_gradient())
        largest = max(largest, float((gradients[1] - gradients[0]).norm()))
        size = max(size, float(gradients[0].norm()))
    if np.ptp(np.diff(losses)[::2]) < 1 or not size:
        raise ArithmeticError("the number that was subtracted did not vary, or there was no gradient to change: this "
                              "shows nothing")
    return largest


def token_gradients(trainer) -> list[list[tuple[list, list]]]:
    """For each post and reply: log pi of each of its tokens and its gradient, by plain forwards; lists of tensors."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    tables = []
    for row in trainer.posts:
        prompt, table = trainer._tokenizer(row["prompt"])["input_ids"], {}
        for reply in trainer.replies:
            ids = torch.tensor([[*prompt, *reply]])
            at = torch.arange(len(reply)), torch.tensor(reply)
            logp = trainer.model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].log_softmax(
                -1)[at]
            slopes = [torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
                      for value in logp]
            with torch.no_grad():
                old = logp.detach() if trainer.ref_model is None else trainer.ref_model(
                    ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[at]
            table[reply] = logp.detach(), old, torch.stack(slopes)
        tables.append(table)
    return tables


def written_out(trainer, tables, groups, settings: dict) -> torch.Tensor:
    """The gradient of one step, from the formulas, one sum over replies and tokens; no trainer, no loss, no autograd.

    sum_i w_i sum_t (-A_i + beta kappa c_it) grad log pi_t, w_i by loss type. With d = log pi_ref - log pi, TRL's
    penalty is (e^d - d - 1) times the importance ratio, whose value is 1 and whose gradient is grad log pi: c = -d.
    Without the ratio (`corrected_kl=False`) c = 1 - e^d.
    """
    posts, k = len(trainer.posts), trainer.num_generations
    which = [i % posts for i in range(len(groups))]
    rewards = np.array([[trainer.tables[post][reply] for reply in group]
                        for post, group in zip(which, groups, strict=True)])
    if settings["advantage"] == "leave_one_out":
        advantage = rewards - (rewards.sum(1, keepdims=True) - rewards) / (k - 1)
        advantage = advantage / max(np.sqrt((advantage**2).mean()), 1e-3)
    else:
        advantage = rewards - rewards.mean(1, keepdims=True)
        spread = {"group": rewards.std(1, ddof=1, keepdims=True), "batch": rewards.std(ddof=1)}
        if settings["scale_rewards"] != "none":
            advantage = advantage / (spread[settings["scale_rewards"]] + 1e-4)
    advantage = settings["objective"].beta * advantage
    if settings["objective"].lam:
        metric, credit = settings["diversity_metric"], np.zeros_like(rewards)
        for g, group in enumerate(groups):
            texts = trainer._tokenizer.batch_decode([list(reply) for reply in group], skip_special_tokens=True)
            for i in range(k):
                credit[g, i] = k * (metric(texts) - metric(texts[:i] + texts[i + 1:]))
        if len(groups) > 1:  # a baseline: the mean credit of all groups but its own
            credit = np.array([row - np.delete(credit, g, axis=0).mean() for g, row in enumerate(credit)])
        advantage = advantage + settings["objective"].lam * credit / max(np.sqrt((credit**2).mean()), 1e-3)
    if (clip := settings.get("advantage_clip")) is not None:
        advantage = np.clip(advantage, -clip, clip)
    lengths = np.array([[len(reply) for reply in group] for group in groups])
    weight = {"dr_grpo": np.full(lengths.shape, 1 / (lengths.size * trainer.max_completion_length)),
              "grpo": 1 / (lengths.size * lengths), "bnpo": np.full(lengths.shape, 1 / lengths.sum()),
              "dapo": np.full(lengths.shape, 1 / lengths.sum())}[settings["loss_type"]]
    total = 0.0
    penalty = settings["objective"].beta * settings.get("kl_weight", 0.0)
    for g, group in enumerate(groups):
        for i, reply in enumerate(group):
            logp, old, slopes = tables[which[g]][reply]
            divergence = logp - old if settings.get("corrected_kl", True) else 1 - (old - logp).exp()
            total = total + weight[g, i] * ((penalty * divergence - advantage[g, i]) @ slopes)
    return total


def formula_cases():
    """(name, settings) of the scaled defaults: TRL's advantages and ours, each loss type, with and without KL."""
    penalties = ((0.0, True), (KAPPA, True), (KAPPA, False))
    for loss_type, (kl_weight, corrected), micro_batches in product(("dr_grpo", "grpo", "bnpo", "dapo"), penalties,
                                                                    (1, 2)):
        if loss_type == "bnpo" and micro_batches > 1:
            continue  # divides by the tokens of a micro-batch, so it depends on how chance splits the batch
        common = dict(loss_type=loss_type, kl_weight=kl_weight, corrected_kl=corrected, micro_batches=micro_batches)
        for scale in ("group", "batch", "none"):
            yield f"TRL's, scale_rewards={scale}", common | dict(objective=REWARD, advantage="group",
                                                                 scale_rewards=scale)
        yield "leave_one_out, batch RMS", common | dict(objective=REWARD, advantage="leave_one_out")
        yield "leave_one_out and diversity, batch RMS, clipped", common | dict(
            objective=Objective(0.0, 0.5, 0.4), advantage="leave_one_out", advantage_clip=0.6,
            diversity_metric=tiny_metric("arbitrary"))


def formula_error(settings: dict, every: int = 53) -> tuple[int, float]:
    """(steps, largest error): each `every`-th of all steps on two groups of two posts, backward against the formula."""
    reference = tiny_policy(seed=1) if settings["kl_weight"] else None
    trainer = tiny_trainer(kl_reference=reference, posts=2, **settings)
    tables = token_gradients(trainer)
    places = groups_of(len(trainer.replies), 2)[0]
    steps = list(product(places, repeat=2))[::every]
    difference, size = 0.0, 0.0
    for step in steps:
        groups = [[trainer.replies[i] for i in group] for group in step]
        trainer.model.zero_grad()
        trainer.backward_of(groups)
        wanted = written_out(trainer, tables, groups, settings)
        difference = max(difference, float((trainer.left_gradient() - wanted).norm()))
        size = max(size, float(wanted.norm()))
    return len(steps), difference / size


def flat_gradient(value: torch.Tensor, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [p for p in model.parameters()
                                                                       if p.requires_grad])])


def kl_gradients(length: int = 2, corrected: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the KL term adds to the expected update (times length / kappa), what it should be by its formula, and the
    gradient of KL(pi || pi_ref) of whole replies; K = 2.

    The formula: at every prefix the gradient of KL(pi || pi_ref) of the next token (uncorrected: of KL(pi_ref || pi)),
    the prefixes' probabilities held fixed.
    """
    reference, updates = tiny_policy(seed=1), []
    for weight in (KAPPA, 0.0):
        trainer = tiny_trainer(REWARD, length=length, advantage="leave_one_out", kl_weight=weight,
                               kl_reference=reference if weight else None, corrected_kl=corrected)
        updates.append(expected_gradient(trainer))
    model, prompt = trainer.model, trainer._tokenizer(trainer.posts[0]["prompt"])["input_ids"]
    value = 0.0
    for start in range(length):
        for prefix in product((1, 2), repeat=start):
            ids = torch.tensor([[*prompt, *prefix]])
            now, old = (policy(ids, attention_mask=torch.ones_like(ids)).logits[0, -1].log_softmax(-1)
                        for policy in (model, reference))
            with torch.no_grad():
                chance = log_probabilities(model, [prefix], prompt)[0].exp() if prefix else 1.0
            value = value + chance * ((now.exp() * (now - old)) if corrected else (old.exp() * (old - now))).sum()
    logp = log_probabilities(model, trainer.replies, prompt)
    with torch.no_grad():
        old = log_probabilities(reference, trainer.replies, prompt)
    whole = (logp.exp() * (logp - old)).sum()
    return (updates[0] - updates[1]) * length / KAPPA, flat_gradient(value, model), flat_gradient(whole, model)


def biases():
    """What the scaled defaults do to the direction and the size of the expected update, against the exact gradient."""
    variants = [("leave_one_out, unscaled", dict(objective=REWARD, advantage="leave_one_out", rms_floor=1e3)),
                ("leave_one_out, batch RMS", dict(objective=REWARD, advantage="leave_one_out")),
                *[(f"TRL's, scale_rewards={scale}", dict(objective=REWARD, advantage="group", scale_rewards=scale))
                  for scale in ("none", "batch", "group")]]
    diversity = ("diversity, batch RMS", dict(objective=DIVERSITY, metric="self_bleu"))
    cases = [(dict(length=length, k=k), loss_type, variant)
             for length, k in ((2, 2), (3, 2), (2, 3)) for loss_type in ("dr_grpo", "grpo", "bnpo", "dapo")
             for variant in (*variants, diversity)]
    cases += [(dict(length=2, k=2, posts=2), "dr_grpo", variant) for variant in (*variants[1:], diversity)]
    for shape, loss_type, (name, settings) in cases:
        function = tiny_metric(settings.get("metric", "self_bleu"))
        trainer = tiny_trainer(loss_type=loss_type, diversity_metric=function, **shape,
                               **{key: value for key, value in settings.items() if key != "metric"})
        wanted, got = exact_gradient(trainer, metric=function), expected_gradient(trainer)
        if loss_type == "dr_grpo":
            got = got * shape["length"]  # its constant
        got = got * settings.get("rms_floor", 1.0)
        yield (name, loss_type, shape["length"], shape["k"], shape.get("posts", 1),
               float(got @ wanted / got.norm() / wanted.norm()), float(got @ wanted / (wanted @ wanted)))
    for length, corrected in product((2, 3), (True, False)):
        got, _, whole = kl_gradients(length, corrected)
        cosine, size = got @ whole / got.norm() / whole.norm(), got @ whole / (whole @ whole)
        yield ("KL term" if corrected else "KL term, use_bias_correction_kl=False", "dr_grpo", length, 2, 1,
               float(cosine), float(size))


class Lines:
    """One line at most every half minute."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            print(f"{self.last - self.start:6.0f} s  {text}", flush=True)


def row_of(name: str, settings: dict) -> list:
    posts, ordered = settings.get("posts", 1), settings.get("ordered", False)
    n = sum(settings["words"] ** i for i in range(settings["length"] + 1))
    return [name, settings["words"] + 1, settings["length"], settings["k"], posts, settings["micro_batches"],
            settings.get("groups_per_step", 1), len(groups_of(n, settings["k"], ordered)[0]) ** posts]


def prove_terms(path: Path, resume: bool, say: Lines, begins: Sequence[str] = ("",)) -> int:
    """Append a row for every proof of a term whose name `begins` so to `path` as it is done; return how many failed."""
    done = list(csv.reader(open(path, newline=""))) if resume and path.exists() else []
    if not done:
        path.write_text(",".join(COLUMNS) + "\n")
    known = {tuple(row[:-1]) for row in done}
    failed = sum(float(row[-1]) >= 1e-8 for row in done[1:])
    cases = [(row_of(name, settings), lambda settings=settings, **watch: relative_error(**settings, **watch), 1e-8)
             for name, settings in grid()]
    cases += [(["KL term", 3, 3, 2, 1, 1, 1, 120], lambda **_: kl_error(True), 1e-8),
              (["KL term, use_bias_correction_kl=False", 3, 3, 2, 1, 1, 1, 120], lambda **_: kl_error(False), 1e-8),
              (["constant_lambda_D", 3, 2, 2, 1, 1, 1, 28], lambda **_: constant_number_error(), 5e-324)]
    cases = [case for case in cases if case[0][0].startswith(tuple(begins))]
    for place, (row, prove, limit) in enumerate(cases, 1):
        if tuple(map(str, row)) in known:
            continue
        where = f"proof {place} of {len(cases)}: {row[0]}, vocabulary {row[1]}, length {row[2]}, K {row[3]}"
        error = prove(progress=lambda done, all, where=where: say(f"{where}: {done} of {all} groups"))
        failed += not error < limit
        with open(path, "a", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerow([*row, f"{error:.1e}"])
        say(where)
    return failed


def kl_error(corrected: bool = True, length: int = 3) -> float:
    """Relative error of the KL term's expected gradient against its own formula (see `kl_gradients`)."""
    got, formula, _ = kl_gradients(length, corrected)
    return float((got - formula).norm() / formula.norm())


def write_formulas(path: Path, say: Lines) -> int:
    """Write a row for each of `formula_cases` to `path`; return how many failed."""
    failed = 0
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["advantage", "loss_type", "kl_weight", "use_bias_correction_kl", "micro_batches", "steps",
                         "largest_relative_error"])
        for name, settings in formula_cases():
            steps, error = formula_error(settings)
            failed += not error < (1e-6 if settings["advantage"] == "group" else 1e-8)  # TRL's own are float32
            writer.writerow([name, settings["loss_type"], settings["kl_weight"], settings["corrected_kl"],
                             settings["micro_batches"], steps, f"{error:.1e}"])
            handle.flush()
            say(f"formulas: {name}, {settings['loss_type']}")
    return failed


def write_biases(path: Path, say: Lines) -> None:
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["update", "loss_type", "max_length", "K", "posts", "cosine", "size"])
        for row in biases():
            writer.writerow([*row[:5], f"{row[5]:.6f}", f"{row[6]:.4f}"])
            handle.flush()
            say(f"bias: {row[0]}, {row[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the rows that gradient.csv has")
    parser.add_argument("--terms", nargs="+", default=[""], help="of gradient.csv only terms whose names begin so")
    parser.add_argument("--parts", nargs="+", default=["formulas", "bias", "gradient"],
                        choices=["formulas", "bias", "gradient"], help="which of the three tables")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    folder, say, failed = Path(__file__).parent, Lines(), 0
    if "formulas" in given.parts:
        failed += write_formulas(folder / "formulas.csv", say)
    if "bias" in given.parts:
        write_biases(folder / "bias.csv", say)
    if "gradient" in given.parts:
        failed += prove_terms(folder / "gradient.csv", given.resume, say, given.terms)
    seconds = time.process_time()
    print(f"{failed} of the proofs failed" if failed else "every proof holds (relative errors below 1e-8; 1e-6 where "
          f"TRL's advantages are float32); {seconds:.0f} s of CPU")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
