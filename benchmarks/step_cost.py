"""How long is a step of each arm, beside a step of the baseline, and where does the time go?

    python benchmarks/step_cost.py OUT [--policy nano] [--steps 4] [--rounds 3]

Trains each arm (ARMS, with the same number of replies or references a step) for a few steps, arm after arm, several
rounds, the order turned by one each round: what else the machine does then falls on all arms alike. The first step of
each round is left out (it warms up). Writes step_cost.csv, one row an arm: median and quartiles of the seconds a step
and of its parts (generation; reward: scoring, advantages and diversity credit; update: all else), and of the ratio to
the baseline's median in the same round; and steps.csv, every step. The reward is the heuristic.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from grpo_engage.base.core import write_csv
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.rewards.heuristic import HeuristicReward
from grpo_engage.train.arm_training import make_trainer
from grpo_engage.train.objective import ARMS
from grpo_engage.train.settings import TrainSettings

PARTS = {"_generate": "generation", "_calculate_rewards": "reward", "_combined_advantages": "reward"}


class StepClock(TrainerCallback):
    """Seconds of every step, and of the parts that `watch` was told to time."""

    def __init__(self) -> None:
        self.steps, self.now = [], {}

    def watch(self, function: Callable, part: str) -> Callable:
        def timed(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.now[part] = self.now.get(part, 0.0) + time.perf_counter() - start

        return timed

    def on_step_begin(self, *_, **__) -> None:
        self.now, self.start = {"generation": 0.0, "reward": 0.0}, time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        seconds = time.perf_counter() - self.start
        self.steps.append({"seconds": seconds, **self.now, "update": seconds - sum(self.now.values())})


def measure(arm: str, base: Path | str, pairs: pd.DataFrame, given: argparse.Namespace, folder: Path) -> list[dict]:
    clock = StepClock()
    settings = TrainSettings.make(
        arm=arm, max_steps=given.steps + 1, learning_rate_supervised=1e-5, learning_rate_policy=1e-5,
        batch_size=given.posts * given.generations, posts_per_step=given.posts, num_generations=given.generations,
        max_new_tokens=given.new_tokens, gradient_accumulation=0, save_steps=10**6, report_to="none")
    trainer = make_trainer(base, pairs, folder, settings, reward=HeuristicReward(), label=arm, callbacks=[clock])
    for name, part in PARTS.items():
        setattr(trainer, name, clock.watch(getattr(trainer, name), part))
    trainer.train()
    return [{"arm": arm, "step": i, **step} for i, step in enumerate(clock.steps)][1:]


def summary(steps: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: median, first and third quartile of seconds and of the ratio to the baseline of its round."""
    baseline = steps[steps["arm"] == "baseline"].groupby("round")["seconds"].median()
    steps = steps.assign(ratio=steps["seconds"] / steps["round"].map(baseline))
    rows = []
    for arm, own in steps.groupby("arm", sort=False):
        row = {"arm": arm, "steps": len(own)}
        for column in ("seconds", "ratio"):
            row |= {column: own[column].median(), f"{column}_q1": own[column].quantile(0.25),
                    f"{column}_q3": own[column].quantile(0.75)}
        rows.append(row | {f"{part}_seconds": own[part].median() for part in ("generation", "reward", "update")})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", default="nano", help="nano, smollm2-135m or a Hub id")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of an arm in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--posts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=28)
    given = parser.parse_args()
    base, pairs = ensure_policy(given.policy), simulate_pairs(60, seed=8)[["tweet", "reply"]]
    arms, rows, loads = list(ARMS), [], []
    for turn in range(given.rounds):
        for arm in arms[turn % len(arms):] + arms[: turn % len(arms)]:
            loads.append(os.getloadavg()[0])
            with tempfile.TemporaryDirectory(prefix="grpo_engage_step_cost_") as folder:
                rows += [{"round": turn, **row} for row in measure(arm, base, pairs, given, Path(folder))]
    steps = pd.DataFrame(rows)
    steps["arm"] = pd.Categorical(steps["arm"], arms)
    steps = steps.sort_values(["arm", "round", "step"]).astype({"arm": str})
    table = summary(steps).assign(policy=given.policy, replies_per_step=given.posts * given.generations)
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out / "steps.csv", steps)
    write_csv(given.out / "step_cost.csv", table)
    print(table.round(3).to_string(index=False))
    print(f"load of the machine while measuring: {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
