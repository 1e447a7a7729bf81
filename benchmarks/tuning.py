"""Which learning rate suits each arm of a preset? As many tries for each of them, judged on validation posts alone.

    python benchmarks/tuning.py OUT.csv [--preset smoke] [--rates 0.5,1,2] [--run RUN] [--work outputs/tuning]

Every arm of the preset is trained with its own learning rate times each of --rates, with one seed, by the stage `train`
of a run, for the preset's steps; an arm that starts from another one starts from that one at its own rate. Each try
replies to the evaluation's validation posts at the preset's temperatures and takes the one that is best for it. What
counts is Pass@10 by the rule of a run (notebook evaluation/12_pass_rule), with one mark for all, set on the baseline at
its own rate. No test post is read. Data, reward and base model are made once, or taken from the finished run --run.

A rate is `chosen` in place of the preset's where it is ahead by more than the standard error of the difference (by
post). The paper of a run reads OUT.csv (benchmarks/tuning.csv) and says what was tuned.

Interrupted, it goes on where it was: a try is known by arm and rate.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from grpo_engage.base.core import REPO_ROOT, child_seed, read_json, say, write_csv
from grpo_engage.data.pairs import data_stage, load_pairs
from grpo_engage.data.truth import gold_of
from grpo_engage.evaluation.evaluation import choose_posts, posts_with_replies
from grpo_engage.evaluation.generation import Job, generate_part
from grpo_engage.evaluation.post_metrics import metrics_of_passes
from grpo_engage.evaluation.scoring import allowed, engagement_scorers, score_replies
from grpo_engage.evaluation.settings import EvaluationSettings, sampled_as
from grpo_engage.evaluation.temperatures import baseline_temperatures, choose_temperatures
from grpo_engage.paper.arms import arm_facts
from grpo_engage.policy.base_models import quiet_libraries
from grpo_engage.policy.replies import policy_stage
from grpo_engage.rewards.heuristic import heuristic_reward_stage
from grpo_engage.rewards.reward_model import reward_model_stage
from grpo_engage.run.graph import job_parameters
from grpo_engage.run.settings import load_preset, resolve_config
from grpo_engage.train.hybrid import train_stage
from grpo_engage.train.settings import TrainSettings

STAGES: dict[str, Callable] = {"data": data_stage, "heuristic_reward": heuristic_reward_stage,
                               "reward_model": reward_model_stage, "policy": policy_stage}
COLUMNS = ["preset", "policy", "arm", "weights", "steps", "schedule", "references", "posts", "k", "factor",
           "learning_rate", "chosen", "pass@10", "se", "ahead", "ahead_se", "temperature", "tau", "judge", "n_posts",
           "n_samples", "conversations", "seed", "seconds"]


def name_of(arm: str, factor: float) -> str:
    """What a try is called: the arm alone at its own rate, so that "baseline" is the one that sets the pass mark."""
    return arm if factor == 1 else f"{arm}_x{factor:g}"


def is_done(folder: Path, parameters: Mapping | None = None) -> bool:
    """Whether a stage completed in `folder` (with these `parameters`)."""
    path = folder / "manifest.json"
    facts = read_json(path) if path.exists() else {}
    return facts.get("status") == "completed" and (parameters is None or facts["parameters"] == dict(parameters))


def make_world(world: Path, config: Mapping) -> None:
    """The stages before training, each unless it is there."""
    for stage, function in STAGES.items():
        if not is_done(world / stage):
            shutil.rmtree(world / stage, ignore_errors=True)
            function(world, **job_parameters(config, stage))


def settings_of(config: Mapping, arm: str, factor: float, seed: int) -> TrainSettings:
    """The preset's settings of `arm` with its learning rate times `factor`; nothing is watched or reported."""
    own = TrainSettings.make(**job_parameters(config, "train", arm, seed))
    name = "learning_rate_policy" if own.objective().beta else "learning_rate_supervised"
    return TrainSettings.given(own, watch_every=0, report_to="none", keep_checkpoints=False, marks=[],
                               **{name: own.learning_rate(own.objective()) * factor})


def train_try(work: Path, world: Path, config: Mapping, arm: str, factor: float, seed: int) -> Path:
    """Train a try, after the one that it starts from, in a run's folder of its own, unless it is there; return that."""
    settings, folder = settings_of(config, arm, factor, seed), work / name_of(arm, factor)
    start, place = settings.objective().warm_start, Path("train") / arm / f"seed{seed}"
    if is_done(folder / place, settings.recorded()):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for stage in STAGES:
        (folder / stage).parent.mkdir(parents=True, exist_ok=True)
        (folder / stage).symlink_to((world / stage).resolve())
    if start != "base":
        other = Path("train") / start / f"seed{seed}"
        origin = train_try(work, world, config, start, 1.0, seed) / other
        (folder / other).parent.mkdir(parents=True)
        (folder / other).symlink_to(origin.resolve())
    train_stage(folder, settings)
    return folder


def validation_posts(world: Path, settings: EvaluationSettings) -> pd.DataFrame:
    """The validation posts that a run of these settings evaluates on."""
    return choose_posts(posts_with_replies(load_pairs(world), "validation"), settings.n_validation_posts,
                        child_seed(settings.scoring.seed, "posts", "validation"))


def replies_of(folder: Path, arm: str, factor: float, seed: int, settings: EvaluationSettings, posts: pd.DataFrame,
               judge: tuple) -> pd.DataFrame:
    """Scored replies of a try to `posts` at each temperature, under its name (see `sampled_as`)."""
    own, parts = settings.sampling.temperature, []
    for temperature in settings.every_temperature():
        job = Job(sampled_as(arm, temperature, own), "system", seed, "validation", arm, temperature)
        made, _, _ = generate_part(folder, job, posts, settings.sampling, settings.scoring.seed)
        parts.append(made.assign(arm=sampled_as(name_of(arm, factor), temperature, own)))
    return score_replies(pd.concat(parts, ignore_index=True), posts, {"judge": judge}, None)


def compared(scored: pd.DataFrame, tries: Sequence[tuple[str, float]], settings: EvaluationSettings) -> pd.DataFrame:
    """arm, factor, chosen, pass@10, se, ahead, ahead_se, temperature, tau and n_posts of each of `tries` (arm, factor),
    its best temperature taken; ahead: of the same arm's own rate, paired by post; se: over posts.

    scored: see `replies_of`, of all tries, the baseline's at its own rate among them.
    """
    own, temperatures = settings.sampling.temperature, settings.every_temperature()
    marks = baseline_temperatures(scored, temperatures, own, settings.scoring.target_pass_at_10).set_index("chosen")
    tau, best = marks.loc[True, "tau"], marks.loc[True, "temperature"]
    names = [name_of(*one) for one in tries]
    chosen = choose_temperatures(scored, names, temperatures, own, tau, best)
    chosen = chosen[chosen["chosen"]].set_index("arm")
    passed = metrics_of_passes(scored.assign(passed=(scored["judge"] >= tau) & allowed(scored)), (10,))
    wide = passed[passed["metric"] == "pass@10"].pivot(index="post", columns="arm", values="value")

    def standard_error(values: pd.Series) -> float:
        return float(values.std(ddof=1) / np.sqrt(len(values)))

    rows = []
    for (arm, factor), name in zip(tries, names, strict=True):
        values = wide[chosen.loc[name, "system"]]
        ahead = values - wide[chosen.loc[name_of(arm, 1), "system"]]
        rows.append({"arm": arm, "factor": factor, "pass@10": values.mean(), "se": standard_error(values),
                     "ahead": ahead.mean(), "ahead_se": standard_error(ahead), "tau": tau,
                     "temperature": chosen.loc[name, "temperature"], "n_posts": len(values)})
    return with_choice(pd.DataFrame(rows))


def with_choice(table: pd.DataFrame) -> pd.DataFrame:
    """`table` (arm, factor, pass@10, ahead, ahead_se) with `chosen`: of each arm the rate with the highest Pass@10,
    where it is ahead of the arm's own by more than the standard error, else its own."""
    best = table.loc[table.groupby("arm")["pass@10"].idxmax()].set_index("arm")
    taken = best["factor"].where(best["ahead"] > best["ahead_se"], 1.0)
    return table.assign(chosen=table["factor"] == table["arm"].map(taken))


def facts_of(folder: Path, arm: str, seed: int) -> dict:
    """What the paper says of an arm, of a try (weights, steps, schedule, references, posts, k, learning_rate), seconds.
    """
    key = f"train/{arm}/seed{seed}"
    manifest = read_json(folder / key / "manifest.json")
    found = arm_facts(SimpleNamespace(manifests={key: manifest}, seeds=[seed]), arm)
    return found | {"weights": " ".join(f"{weight:g}" for weight in found["weights"]),
                    "seconds": round(manifest["wall_seconds"], 1)}


def tune(out: Path, preset: str, factors: Sequence[float], work: Path, run: Path | None = None, seed: int = 0,
         overrides: Sequence[str] = ()) -> pd.DataFrame:
    """Make what is missing; write OUT.csv after every try, and return it. overrides: as -p of a run.

    Raises: ValueError for a rate that is not above 0 and for a preset without a baseline.
    """
    factors = sorted({1.0, *map(float, factors)}, key=lambda factor: (factor != 1, factor))
    if min(factors) <= 0:
        raise ValueError(f"--rates {','.join(f'{factor:g}' for factor in factors)}: each must be above 0; it "
                         "multiplies the preset's learning rate")
    config = resolve_config(load_preset(preset), overrides) | {"preset": preset}
    if "baseline" not in config["arms"]:
        raise ValueError(f"preset {preset}: its arms are {', '.join(config['arms'])}; the pass mark needs a baseline")
    settings = EvaluationSettings.make(**job_parameters(config, "evaluation"))
    world = run or work / "world"
    if run is None:
        make_world(world, config)
    pairs, posts = load_pairs(world), validation_posts(world, settings)
    judge_name, scorers = engagement_scorers(world, settings.scoring.judge, gold_of(pairs))
    shared = {"preset": preset, "policy": read_json(world / "policy" / "policy.json")["name"], "judge": judge_name,
              "n_samples": settings.sampling.n_samples, "conversations": pairs["conversation_id"].nunique(),
              "seed": seed}
    tries, scored, facts, table = [], [], [], pd.DataFrame(columns=COLUMNS)
    for arm in sorted(config["arms"], key=lambda arm: arm != "baseline"):
        for factor in factors:
            folder = train_try(work, world, config, arm, factor, seed)
            scored.append(replies_of(folder, arm, factor, seed, settings, posts, scorers["judge"]))
            facts.append(facts_of(folder, arm, seed) | shared)
            tries.append((arm, factor))
            found = compared(pd.concat(scored, ignore_index=True), tries, settings)
            table = pd.DataFrame(facts).join(found)[COLUMNS]
            write_csv(out, table)
            say(f"{name_of(arm, factor)}: Pass@10 {found['pass@10'].iloc[-1]:.3f}, {len(tries)} of "
                f"{len(config['arms']) * len(factors)} tries")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--rates", default="0.5,1,2", help="what each arm's own learning rate is multiplied by")
    parser.add_argument("--run", type=Path, help="a finished run, whose data, reward and base model are taken")
    parser.add_argument("--work", type=Path, default=REPO_ROOT / "outputs" / "tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="another value than the preset's")
    given = parser.parse_args()
    quiet_libraries()
    table = tune(given.out, given.preset, [float(rate) for rate in given.rates.split(",")], given.work, given.run,
                 given.seed, given.p)
    print(table.drop(columns=["preset", "policy", "judge", "seed"]).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
