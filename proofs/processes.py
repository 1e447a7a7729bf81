"""Two processes, given the same completions, against one: rewards, credit, advantages, losses, metrics and weights.

The tiny policy of `gradient.py` trains for three steps on completions that are given, not sampled; a step has 12
replies of unequal length. With K = 4 the second of the three groups lies in both processes, with K = 3 none does.
Everything else is the real path: `accelerate launch`, gloo, the sampler, scoring, gathering, micro-batches, backward, a
step of the optimiser. That is AdamW where all is float64, and SGD where TRL's head computes in float32: AdamW divides a
gradient by its own size, and so turns the rounding of one that is 0 into a step of full length.

All prompts have the same length: TRL pads on the left and gives no positions, so for GPT-2, which counts positions from
the left, padding changes what the model says. (Models with rotary positions do not mind.)

    python proofs/processes.py     # all cases -> proofs/processes.csv
    python proofs/processes.py --machines 2 --out x.csv

With two machines each process has a launcher of its own, of which the second joins the first in a folder, as
`python -m grpo_engage join` does on another machine; they meet at 127.0.0.1.
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback
from trl import GRPOConfig

from grpo_engage.base.processes import report_errors, run_processes, world_size
from grpo_engage.studies.enumeration import EnumeratedTrainer, all_replies, tiny_policy, tiny_tokenizer
from grpo_engage.train.objective import Objective

REPLIES, STEPS, TOLERANCE = 12, 3, 1e-5
NO_DIFFERENCE = ("way", "case", "weights_moved_by", "held")  # columns of the table
CASES = {
    "reward, K = 4 (a group in two processes)": dict(objective=Objective(0.0, 1.0, 0.0), accumulation=1),
    "reward, K = 3": dict(objective=Objective(0.0, 1.0, 0.0), k=3),
    "reward, loss_type grpo": dict(objective=Objective(0.0, 1.0, 0.0), loss_type="grpo"),
    "reward, exact mode": dict(objective=Objective(0.0, 1.0, 0.0), loss_type="dr_grpo", advantage="leave_one_out",
                               exact=True, optim="adamw_torch"),
    "supervised": dict(objective=Objective(1.0, 0.0, 0.0), optim="adamw_torch"),
    "supervised and diversity, groups every 2nd step": dict(objective=Objective(1.0, 0.0, 0.3), policy_every=2),
    "all three, max_at_3, clipped": dict(objective=Objective(0.3, 0.5, 0.2), advantage="max_at_k", max_k=3,
                                         advantage_clip=0.4),
    "reward x diversity": dict(objective=Objective(0.0, 1.0, 0.0), diversity_form="product"),
    "max_at_k, k from 4 down to 1": dict(objective=Objective(0.0, 1.0, 0.0), advantage="max_at_k", k_schedule=(1, 2)),
    "all three, KL to the start, LoRA": dict(objective=Objective(0.3, 0.5, 0.2), kl_weight=0.5, lora=True,
                                             accumulation=1),
}


class Given(EnumeratedTrainer):
    """ReplyTrainer that says what a table holds for step and place in the step, whichever process asks."""

    def _generate(self, prompts):
        replies = all_replies(2, self.max_completion_length)
        chosen = np.random.default_rng([5, self.state.global_step]).integers(len(replies), size=REPLIES)
        first = self.accelerator.process_index * len(prompts)
        self.say_next([[replies[index] for index in chosen[first : first + len(prompts)]]])
        return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if "advantages" in output:
            self.seen.append({"rewards": self._scored[0].tolist(), "texts": self._scored[1],
                              "advantages": self.accelerator.gather(output["advantages"]).tolist()})
        return output


def in_pieces() -> bool:
    """Whether accelerate was started with FSDP or DeepSpeed, which it refuses where it is told to use a CPU."""
    return "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))


def train(objective: Objective, k: int = 4, lora: bool = False, loss_type: str = "dapo", optim: str = "sgd",
          accumulation: int = 2, **settings) -> dict:
    """Three steps in this world; what was computed, as plain lists."""
    def reward(completion_ids, **_):
        return [(7 * sum(ids) + len(ids)) % 9 / 8 for ids in completion_ids]

    own = REPLIES // world_size()
    folder = tempfile.TemporaryDirectory(prefix="grpo_engage_proof_")  # gone when this function ends
    arguments = GRPOConfig(
        folder.name, max_steps=STEPS, num_generations=k,
        learning_rate=0.3 if optim == "sgd" else 0.01,
        per_device_train_batch_size=own // accumulation, gradient_accumulation_steps=accumulation,
        max_completion_length=3, bf16=False, use_cpu=not in_pieces(), gradient_checkpointing=False, loss_type=loss_type,
        temperature=1.0, beta=0.0, report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no", seed=2,
        optim=optim, scale_rewards="group" if settings.get("advantage", "group") == "group" else "batch")
    prompts = ["yes no", "no no", "yes yes", "no yes", "yes no", "no no"]
    references = ["no no yes", "yes", "no yes", "yes no yes no yes", "no", "yes yes"]
    rows = Dataset.from_dict({"prompt": prompts * 2, "reference": references * 2})
    model = tiny_policy()
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"],
                                                 fan_in_fan_out=True, task_type="CAUSAL_LM")).double()
    trainer = Given(model, [reward] if objective.beta else None, arguments, rows, processing_class=tiny_tokenizer(),
                    objective=objective, **settings)
    trainer.remove_callback(PrinterCallback)
    trainer.seen = []

    def weights() -> torch.Tensor:
        trained = trainer.accelerator.unwrap_model(trainer.model).parameters()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained if p.requires_grad]
        return torch.cat([p.detach().double().flatten() for p in whole])

    start = weights()
    trainer.train()
    unlike = ["time", "runtime", "per_second", "profiling", "num_tokens", "epoch"]
    if accumulation > 1:  # TRL's means over micro-batches of means over tokens: what they are depends on the shuffling
        unlike += ["entropy", "kl"]
    logs = [{name: value for name, value in entry.items() if not any(word in name for word in unlike)}
            for entry in trainer.state.log_history if "loss" in entry]
    return {"seen": trainer.seen, "logs": logs, "weights": weights().tolist(), "held": held(trainer),
            "moved": float((weights() - start).abs().max())}


def held(trainer) -> str:
    """Who holds the weights in pieces (fsdp: at least half of them are; deepspeed), "" where each process has all."""
    parameters = list(trainer.model.parameters())
    shared = sum(p.numel() for p in parameters if hasattr(p, "full_tensor"))
    if trainer.is_deepspeed_enabled and trainer.deepspeed.zero_optimization_stage() == 2:
        return "deepspeed"
    return "fsdp" if trainer.is_fsdp_enabled and shared > sum(p.numel() for p in parameters) / 2 else ""


def difference(one, other) -> float:
    """The largest absolute difference of two structures of numbers; infinite where they are not alike otherwise."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max([difference(one[name], other[name]) for name in one], default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max([difference(*pair) for pair in zip(one, other, strict=True)], default=0.0)
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other)
    return 0.0 if one == other else float("inf")


@contextlib.contextmanager
def second_machine(folder: str):
    """A process of its own that joins what runs in `folder`, as machine 1, meanwhile."""
    os.environ["GRPO_ENGAGE_ADDRESS"] = "127.0.0.1"
    program = f"from grpo_engage.base.processes import join_processes; join_processes({folder!r}, 1, 600)"
    other = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
        if code := other.wait(60):
            raise RuntimeError(f"the second machine ended with exit code {code}")
    finally:
        other.kill()
        del os.environ["GRPO_ENGAGE_ADDRESS"]


def compare(cases, machines: int = 1) -> list[dict]:
    """One row a case: the largest differences between one process and two, on so many machines."""
    with tempfile.TemporaryDirectory() as folder:
        with second_machine(folder) if machines == 2 else contextlib.nullcontext():
            run_processes(2, [__file__, "--write", folder, "--cases", *cases], Path(folder), "two processes", "",
                          machines)
        return [compared(Path(folder), place, name) for place, name in enumerate(cases)]


def compared(folder: Path, place: int, name: str) -> dict:
    """The row of the case `name`, whose result in two processes `write` left in `folder`."""
    alone, both = train(**CASES[name]), json.loads((folder / f"{place}.json").read_text())
    parts = {part: ([seen[part] for seen in alone["seen"]], [seen[part] for seen in both["seen"]])
             for part in ("rewards", "texts", "advantages")}
    parts |= {"losses": ([entry["loss"] for entry in alone["logs"]], [e["loss"] for e in both["logs"]]),
              "metrics": (alone["logs"], both["logs"]), "weights": (alone["weights"], both["weights"])}
    return {"case": name, **{part: f"{difference(*pair):.1e}" for part, pair in parts.items()},
            "weights_moved_by": f"{alone['moved']:.1e}"} | ({"held": both["held"]} if both["held"] else {})


def write(folder: Path, cases) -> None:
    for place, name in enumerate(cases):
        result = train(**CASES[name])
        if torch.distributed.get_rank() == 0:
            (folder / f"{place}.json").write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--machines", type=int, default=1, choices=(1, 2))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # one of the two processes
    args = parser.parse_args()
    if args.write:
        report_errors(lambda: write(args.write, args.cases), args.write)
        return 0
    rows = compare(args.cases, args.machines)
    with open(args.out, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return told(rows)


def told(rows: list[dict]) -> int:
    """Print `rows`; the exit code: 1 where a case differs."""
    wrong = 0
    for row in rows:
        numbers = {part: float(value) for part, value in row.items() if part not in NO_DIFFERENCE}
        wrong += max(numbers.values()) > TOLERANCE
        print(f"{row.get('way', '')} {row['case']:50} " + ", ".join(f"{part} {v:.0e}" for part, v in numbers.items()))
    print(f"{wrong} cases differ" if wrong else f"every difference is at most {TOLERANCE:g}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
