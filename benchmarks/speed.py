"""A training step and sampling, ours beside TRL's and transformers' own, in turn on the same posts.

    python benchmarks/speed.py OUT.csv [--policy smollm2-135m] [--data FILE] [--rounds 5] [--sizes 2x8x32 2x8x64]
                               [--only grpo hybrid supervised sampling] [--growth OUT2.csv]

A size is posts x replies a post x new tokens. `grpo` is `trl.GRPOTrainer` (float32, no checkpointing, one pass a step:
its best here) beside our arm; `hybrid` our arm of that name beside our grpo; `supervised` `trl.SFTTrainer` beside our
baseline, 16 references a step; `sampling` transformers' `generate` beside ours, in training's and in evaluation's use.
Lengths `full`: nothing ends a reply before its limit; `natural`: what the model says, with replies cut at the limit
masked in both. Rounds alternate, the first is left out. seconds: median over rounds with quartiles; ratio: median over
rounds of theirs / ours. peak_mb: highest resident memory of a process of its own that did two steps. Posts are those
of --data (any file of pairs), else the simulator's. --growth: grpo's step against K, reply length and post length; may
be stopped and started again, and its memory is that of one step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from grpo_engage.base.core import peak_memory, say, write_csv
from grpo_engage.data.reading import read_pairs
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy, quiet_libraries
from grpo_engage.policy.sampling import format_prompt, generate_replies, load_policy
from grpo_engage.train.objective import Objective
from grpo_engage.train.reference_trainer import ReplyConfig
from grpo_engage.train.trainer import ReplyTrainer

OBJECTIVES = {"grpo": Objective(0, 1, 0), "hybrid": Objective(0.3, 0.5, 0.2), "supervised": Objective(1, 0, 0)}
NEVER = 10**9  # the id of no token
REFERENCES = 16  # a step of supervised training


def variety(completions: list[str], **_) -> list[float]:
    return [len(set(text)) / 50 for text in completions]


def examples(data: str, post_words: int = 0) -> pd.DataFrame:
    """128 posts, each with a reply; post_words > 0: made of posts one after the other, each so many words long."""
    table = read_pairs(data)[0] if data else simulate_pairs(400, seed=0)
    table = table.drop_duplicates("tweet").head(128).reset_index(drop=True)
    if post_words:
        words = " ".join(table["tweet"]).split()
        table["tweet"] = [" ".join(words[start : start + post_words]) for start in range(len(table))]
    return table


def trainer_of(kind: str, size: tuple[int, int, int], lengths: str, table: pd.DataFrame, place: str, folder: str):
    """A trainer of `kind` (`stock grpo`, `grpo`, `hybrid`, `stock supervised`, `supervised`), ready to step."""
    posts, replies, tokens = size
    torch.manual_seed(0)
    model, tokenizer = load_policy(place, fast_path=not kind.startswith("stock"))
    columns = {"prompt": [format_prompt(post, tokenizer, room=tokens) for post in table["tweet"]],
               "reference": table["reply"].tolist()}
    shared = dict(bf16=False, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to="none",
                  disable_tqdm=True, save_strategy="no", learning_rate=1e-5, max_steps=10**6, logging_steps=10**6)
    adapter = {"peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")}
    if kind == "stock supervised":
        rows = Dataset.from_dict({"prompt": columns["prompt"], "completion": columns["reference"]})
        config = SFTConfig(folder, per_device_train_batch_size=REFERENCES, completion_only_loss=True, **shared)
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, **adapter)
    else:
        alone = kind == "supervised"
        config = (ReplyConfig if alone else GRPOConfig)(
            folder, per_device_train_batch_size=REFERENCES if alone else posts * replies, num_generations=replies,
            max_completion_length=tokens, top_k=0, mask_truncated_completions=lengths == "natural",
            **({"generates": False} if alone else {}), **shared)
        stock = kind == "stock grpo"
        own = {} if stock else {"objective": OBJECTIVES[kind]}
        trainer = (GRPOTrainer if stock else ReplyTrainer)(
            model, None if alone else variety, config, Dataset.from_dict(columns), processing_class=tokenizer, **own,
            **adapter)
        if lengths == "full":
            trainer.eos_token_ids = model.generation_config.eos_token_id = [NEVER]
            trainer.generation_config.eos_token_id = [NEVER]
    trainer.create_optimizer_and_scheduler(10**6)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def stepper(trainer) -> Callable[[], float]:
    """A function that does one step as transformers' Trainer does, and gives its seconds."""
    def batches():
        while True:
            yield from trainer.get_train_dataloader()

    stream, device = batches(), trainer.accelerator.device

    def step() -> float:
        start = time.perf_counter()
        (batch, *_), items = trainer.get_batch_samples(stream, 1, device)
        trainer.training_step(trainer.model, batch, items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def sampler(way: str, size: tuple[int, int, int], table: pd.DataFrame, place: str) -> Callable[[], float]:
    """A function that samples an evaluation's replies, 8 posts x 16, and gives its seconds."""
    model, tokenizer = load_policy(place, fast_path=way == "ours")
    posts = table["tweet"].tolist()[:8]

    def sample() -> float:
        start = time.perf_counter()
        generate_replies(model, tokenizer, posts, 16, max_new_tokens=size[2], batch_size=128, label="")
        return time.perf_counter() - start

    return sample


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> pd.DataFrame:
    """Seconds of each way, one row a round, after a first round that is left out."""
    seen = [{name: step() for name, step in ways.items()} for _ in range(rounds + 1)]
    return pd.DataFrame(seen[1:])


def rows_of(seconds: pd.DataFrame, theirs: str, facts: dict) -> list[dict]:
    quartiles = seconds.quantile([0.25, 0.5, 0.75])
    ratios = {name: (seconds[theirs] / seconds[name]).median() for name in seconds}
    for name in seconds:
        say(f"{facts} {name}: {quartiles[name][0.5]:.2f} s, {ratios[name]:.2f} times as fast as {theirs}")
    return [facts | {"way": name, "seconds": quartiles[name][0.5], "seconds_q1": quartiles[name][0.25],
                     "seconds_q3": quartiles[name][0.75], "rounds": len(seconds), "beside": theirs,
                     "ratio": ratios[name]} for name in seconds]


def peak_mb(given: argparse.Namespace, kind: str, size: str, lengths: str, words: int = 0, steps: int = 2) -> float:
    """Highest resident memory of a process that does so many steps of `kind`, MB."""
    command = [sys.executable, __file__, "unused", "--policy", given.policy, "--data", given.data, "--alone", kind,
               "--sizes", size, "--lengths", lengths, "--post-words", str(words), "--steps", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(given: argparse.Namespace, folder: str) -> None:
    size = tuple(map(int, given.sizes[0].split("x")))
    step = stepper(trainer_of(given.alone, size, given.lengths[0], examples(given.data, given.post_words),
                              str(ensure_policy(given.policy)), folder))
    for _ in range(given.steps):
        step()
    print(peak_memory() / 2**20)


def compared(given: argparse.Namespace, folder: str) -> None:
    place, table, rows = str(ensure_policy(given.policy)), examples(given.data), []
    machine = {"policy": given.policy, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else
               f"{os.cpu_count()} cores", "threads": torch.get_num_threads()}
    pairs = {"grpo": ("stock grpo", "grpo"), "hybrid": ("grpo", "hybrid"),
             "supervised": ("stock supervised", "supervised")}
    for size_name in given.sizes:
        size = tuple(map(int, size_name.split("x")))
        for lengths in given.lengths:
            facts = machine | {"size": size_name, "lengths": lengths}
            for what in [name for name in given.only if name in pairs]:
                if what == "supervised" and (size_name, lengths) != (given.sizes[0], given.lengths[0]):
                    continue  # it has neither
                kinds = pairs[what]
                steps = {kind: stepper(trainer_of(kind, size, lengths, table, place, folder)) for kind in kinds}
                own = rows_of(in_turn(steps, given.rounds), kinds[0], facts | {"what": what})
                for row in own if given.memory else ():
                    row["peak_mb"] = peak_mb(given, row["way"], size_name, lengths)
                rows += own
                if what == "grpo" and "sampling" in given.only:
                    rows += rows_of(in_turn(sampling_steps(size, lengths, table, place, folder), given.rounds),
                                    "stock", facts | {"what": "sampling in training"})
                write_csv(given.out, pd.DataFrame(rows))
            if "sampling" in given.only and lengths == "natural":
                ways = {way: sampler(way, size, table, place) for way in ("stock", "ours")}
                rows += rows_of(in_turn(ways, given.rounds), "stock", facts | {"what": "sampling in evaluation"})
                write_csv(given.out, pd.DataFrame(rows))


def sampling_steps(size, lengths, table, place, folder) -> dict[str, Callable[[], float]]:
    """Sampling of a step's replies, by TRL's trainer and by ours."""
    made = {way: trainer_of(kind, size, lengths, table, place, folder)
            for way, kind in (("stock", "stock grpo"), ("ours", "grpo"))}
    turn = iter(range(10**6))

    def timed(trainer) -> Callable[[], float]:
        def sample() -> float:
            first = next(turn) // 2 * size[0]
            prompts = [trainer.train_dataset[(first + post) % len(trainer.train_dataset)]["prompt"]
                       for post in range(size[0]) for _ in range(size[1])]
            ids = trainer._tokenize_prompts(prompts)[0]
            start = time.perf_counter()
            trainer._generate_single_turn(ids, None, {}, size[1])
            return time.perf_counter() - start

        return sample

    return {way: timed(trainer) for way, trainer in made.items()}


def growth(given: argparse.Namespace, folder: str) -> None:
    """Step time and memory of stock and ours against K, reply length and post length, full lengths.

    A point of this policy that the file has is not timed again. Memory needs no idle machine, so it may come later.
    """
    place = str(ensure_policy(given.policy))
    rows = pd.read_csv(given.growth).to_dict("records") if given.growth.exists() else []
    points = [("replies", (2, value, 32), 0, value) for value in (4, 8, 16, 32)]
    points += [("new tokens", (2, 8, value), 0, value) for value in (16, 32, 64, 128)]
    points += [("words of a post", (2, 8, 32), value, value) for value in (5, 20, 80, 160)]
    for axis, size, words, value in points:
        facts = {"policy": given.policy, "axis": axis, "value": value}
        if not any(row.items() >= facts.items() for row in rows):
            table = examples(given.data, words)
            steps = {kind: stepper(trainer_of(kind, size, "full", table, place, folder))
                     for kind in ("stock grpo", "grpo")}
            rows += rows_of(in_turn(steps, given.rounds), "stock grpo", facts)
        write_csv(given.growth, pd.DataFrame(rows))
        for row in rows if given.memory else ():
            if row.items() >= facts.items() and pd.isna(row.get("peak_mb")):
                row["peak_mb"] = peak_mb(given, row["way"], "x".join(map(str, size)), "full", words, steps=1)
        write_csv(given.growth, pd.DataFrame(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", default="smollm2-135m")
    parser.add_argument("--data", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["2x8x32", "2x8x64"])
    parser.add_argument("--lengths", nargs="+", default=["full", "natural"])
    parser.add_argument("--only", nargs="+", default=["grpo", "hybrid", "supervised", "sampling"])
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--growth", type=Path, help="measure growth into this file instead")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--post-words", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        (alone if given.alone else growth if given.growth else compared)(given, folder)


if __name__ == "__main__":
    main()
