__version__ = "0.2.0"
__doc__ = """Learn a reward from real engagement, train a small language model on it, and evaluate what changed.

What a user of the library wants is here, `from grpo_engage import ReplyTrainer, read_pairs`. Each name is loaded from
its module when it is first asked for, so that `import grpo_engage` costs nothing:
"""
# nbdev rewrites the line of the version and nothing else. The one table of what is here: module -> names. Modules import
# from each other, never through it.
_NAMES = {
    "data.reading": ("read_pairs",),
    "data.splitting": ("split_conversations",),
    "data.simulator": ("simulate_pairs",),
    "data.gold": ("gold_appeal",),
    "data.pairs": ("load_pairs",),
    "text.metrics": ("pass_at_k", "self_bleu", "distinct_n", "rouge_l"),
    "text.embedding": ("embed",),
    "text.diversity": ("set_diversity", "marginal_credit"),
    "text.sets": ("ead", "vendi", "semantic_diversity"),
    "text.safety": ("safety_flags",),
    "rewards.heuristic": ("HeuristicReward",),
    "rewards.circumstances": ("deconfound",),
    "rewards.engagement_model": ("EngagementRewardModel",),
    "rewards.validation": ("validate_scores",),
    "rewards.reward_model": ("CombinedReward", "beat_probability"),
    "policy.base_models": ("ensure_policy",),
    "policy.sampling": ("load_policy", "load_adapted", "clean_text", "format_prompt", "generate_replies", "reply_nll"),
    "train.objective": ("Objective",),
    "train.advantages": ("group_advantage", "leave_one_out_advantage", "max_at_k_advantage"),
    "train.trainer": ("ReplyTrainer",),
    "train.reference_trainer": ("ReplyConfig",),
    "train.settings": ("TrainSettings",),
    "train.arm_training": ("train_arm",),
    "evaluation.post_metrics": ("metrics_by_post",),
    "stats.intervals": ("cluster_bootstrap", "paired_difference", "holm", "seed_interval"),
    "stats.crossed": ("crossed_difference", "posts_and_seeds_needed"),
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE)
__doc__ += "\n" + "\n".join(f"{module}: {', '.join(names)}" for module, names in _NAMES.items())


def __getattr__(name: str):
    """`name` from its module (PEP 562). Raises: AttributeError that names the nearest there is."""
    if name not in _MODULE:
        raise AttributeError(_unknown(name))
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    return value


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    plain = {known.lower().replace("_", ""): known for known in __all__}
    near = get_close_matches(name.lower().replace("_", ""), plain, n=1)
    return (f"module {__name__!r} has no attribute {name!r}"
            + (f"; did you mean {plain[near[0]]!r}?" if near else "; help(grpo_engage) lists what there is"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
