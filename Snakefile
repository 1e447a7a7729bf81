"""The graph of a run: which stage reads what, and what counts as done.

`python -m grpo_engage run` starts it inside the run's folder with the run's config.json; every path here is relative to
that folder. A job's parameters are repeated as `params`, so that Snakemake sees when one changed and redoes what depends
on it. Snakemake deletes the outputs of a failed job. The executed notebook is therefore declared as a log, and manifest
and checkpoints are not declared at all: the first two must survive to tell why, the last so that a killed training goes on.
"""

import sys
from pathlib import Path

from grpo_engage.train.objective import trainable_arm
from grpo_engage.run.settings import STAGES
from grpo_engage.run.runner import job_parameters

NOTEBOOKS = Path(workflow.basedir) / "nbs"
# The notebooks whose code decides what a stage writes; a change in one of them redoes the stage.
ROOMS = {"data": ["01_", "data/"], "heuristic_reward": ["02_", "rewards/00"], "reward_model": ["03_", "rewards/"],
         "policy": ["04_", "policy/"], "best_of_n": ["05_", "rewards/", "policy/"], "train": ["06_", "07_", "train/"],
         "paper": ["09_", "paper/"], "evaluation": ["08_", "evaluation/", "stats/", "text/"]}
SOURCE = [config["stages"]["data"]["data_path"]] if config["stages"]["data"]["source"] == "file" else []
JOB = f"exec {sys.executable} -m grpo_engage job"


def notebooks(stage):
    return sorted(str(path) for room in ROOMS[stage] for path in NOTEBOOKS.glob(f"{room}*.ipynb"))


def logs(stage, folder=""):
    return {"notebook": f"{folder or stage}/{STAGES[stage]}.ipynb"}


def parameters(stage, arm="", seed=None):
    return job_parameters(config, stage, arm, seed)


rule data:
    input:
        SOURCE,
        notebooks("data"),
    output:
        "data/pairs.parquet",
        "data/rejected.csv",
        "data/margins.csv",
    log:
        **logs("data"),
    params:
        parameters=parameters("data"),
    threads: workflow.cores
    shell:
        JOB + " data"


rule heuristic_reward:
    input:
        "data/pairs.parquet",
        notebooks("heuristic_reward"),
    output:
        "heuristic_reward/scores.parquet",
        "heuristic_reward/validation.json",
    log:
        **logs("heuristic_reward"),
    params:
        parameters=parameters("heuristic_reward"),
    threads: workflow.cores
    shell:
        JOB + " heuristic_reward"


rule reward_model:
    input:
        "data/pairs.parquet",
        "heuristic_reward/scores.parquet",
        notebooks("reward_model"),
    output:
        "reward_model/reward/model.safetensors",
        "reward_model/judge/model.safetensors",
        "reward_model/labels.parquet",
        "reward_model/validation.json",
    log:
        **logs("reward_model"),
    params:
        parameters=parameters("reward_model"),
    threads: workflow.cores
    shell:
        JOB + " reward_model"


rule policy:
    input:
        "data/pairs.parquet",
        notebooks("policy"),
    output:
        "policy/policy.json",
    log:
        **logs("policy"),
    params:
        parameters=parameters("policy"),
    threads: workflow.cores
    shell:
        JOB + " policy"


rule best_of_n:
    input:
        "data/pairs.parquet",
        "reward_model/reward/model.safetensors",
        "reward_model/judge/model.safetensors",
        "policy/policy.json",
        notebooks("best_of_n"),
    output:
        "best_of_n/curves.csv",
        "best_of_n/peaks.csv",
        "best_of_n/paired.csv",
        "best_of_n/replies.csv",
    log:
        **logs("best_of_n"),
    params:
        parameters=parameters("best_of_n"),
    threads: workflow.cores
    shell:
        JOB + " best_of_n"


def warm_start(wildcards):
    chosen = parameters("train", wildcards.arm, int(wildcards.seed)).get("warm_start", "arm")
    origin = trainable_arm(wildcards.arm, chosen).warm_start
    return [] if origin == "base" else [f"train/{origin}/seed{wildcards.seed}/adapter/adapter_model.safetensors"]


rule train:
    input:
        "data/pairs.parquet",
        "reward_model/labels.parquet",
        "reward_model/reward/model.safetensors",
        "reward_model/validation.json",
        "policy/policy.json",
        warm_start,
        notebooks("train"),
    output:
        "train/{arm}/seed{seed}/adapter/adapter_model.safetensors",
        "train/{arm}/seed{seed}/train_log.csv",
        "train/{arm}/seed{seed}/verdict.json",
    log:
        **logs("train", "train/{arm}/seed{seed}"),
    params:
        parameters=lambda wildcards: parameters("train", wildcards.arm, int(wildcards.seed)),
    wildcard_constraints:
        arm="[a-z_0-9]+",
        seed="[0-9]+",
    threads: workflow.cores
    shell:
        JOB + " train --arm {wildcards.arm} --seed {wildcards.seed}"


rule evaluation:
    input:
        expand("train/{arm}/seed{seed}/adapter/adapter_model.safetensors", arm=config["arms"], seed=config["seeds"]),
        "data/pairs.parquet",
        "reward_model/judge/model.safetensors",
        "reward_model/reward/model.safetensors",
        config["stages"]["evaluation"].get("arm_files", []),
        notebooks("evaluation"),
    output:
        "evaluation/generations.parquet",
        "evaluation/scores.parquet",
        "evaluation/pass.json",
        "evaluation/metrics.csv",
        "evaluation/comparisons.csv",
        "evaluation/robustness.csv",
        "evaluation/curves.csv",
        "evaluation/notes.csv",
    log:
        **logs("evaluation"),
    params:
        parameters=parameters("evaluation"),
    threads: workflow.cores
    shell:
        JOB + " evaluation"


rule paper:
    default_target: True
    input:
        "data/margins.csv",
        "heuristic_reward/validation.json",
        "reward_model/validation.json",
        expand("train/{arm}/seed{seed}/train_log.csv", arm=config["arms"], seed=config["seeds"]),
        "evaluation/metrics.csv",
        "evaluation/comparisons.csv",
        "evaluation/curves.csv",
        "evaluation/pass.json",
        expand("train/{arm}/seed{seed}/verdict.json", arm=config["arms"], seed=config["seeds"]),
        "policy/policy.json",
        "best_of_n/peaks.csv",
        notebooks("paper"),
        str(Path(workflow.basedir) / "paper" / "main.tex"),
        str(Path(workflow.basedir) / "paper" / "references.bib"),
    output:
        "paper/macros.tex",
        "paper/main.pdf",
    log:
        **logs("paper"),
    params:
        parameters=parameters("paper"),
    threads: workflow.cores
    shell:
        JOB + " paper"
