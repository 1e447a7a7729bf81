"""Training at the sizes that these tests were written for, with loose names in place of a `TrainSettings`."""

import pandas as pd

from grpo_engage.train import arm_training
from grpo_engage.train.objective import Objective
from grpo_engage.train.settings import TrainSettings

SIZES = dict(posts_per_step=8, num_generations=8, kl_weight=0.0, gradient_accumulation=0, save_steps=20,
             report_to="none")


def settings(options):
    """(TrainSettings, other arguments) of `options`; `learning_rate` is that of every arm, an unknown metric a function
    of one's own."""
    options = SIZES | options
    if "learning_rate" in options:
        rate = options.pop("learning_rate")
        options |= dict(learning_rate_supervised=rate, learning_rate_policy=rate)
    if callable(options.get("diversity_metric")):
        options["set_function"] = options.pop("diversity_metric")
    named = {name: options.pop(name) for name in list(options) if name in TrainSettings.leaves() and name not in (
        "seed", "reward", "warm_start", "keep_checkpoints")}
    return TrainSettings.make(**named), options


def train_arm(base, examples, folder, **options):
    given, others = settings(options)
    return arm_training.train_arm(base, examples, folder, given, **others)


def make_trainer(base, examples, folder, **options):
    given, others = settings(options)
    return arm_training.make_trainer(base, examples, folder, given, **others)


def train_supervised(base, examples, folder, **options):
    return train_arm(base, examples, folder, objective=Objective(1.0, 0.0, 0.0), label="supervised",
                     **{"micro_batch_size": 16} | options)


def make_grpo_trainer(base, posts, reward, folder, **options):
    return make_trainer(base, pd.DataFrame({"tweet": list(posts)}), folder, objective=Objective(0.0, 1.0, 0.0),
                        reward=reward, label="grpo", **{"kl_weight": 0.02, "save_steps": 10} | options)


def train_grpo(base, posts, reward, folder, **options):
    return train_arm(base, pd.DataFrame({"tweet": list(posts)}), folder, objective=Objective(0.0, 1.0, 0.0),
                     reward=reward, label="grpo", **{"kl_weight": 0.02, "save_steps": 10} | options)
