"""The graph of a run: which stage comes after which.

`python -m grpo_engage run` starts it inside the run's folder with the run's config.json; every path here is relative to
that folder. Which files a stage reads and writes stands in `nbs/run/04_graph.ipynb`, and so does what counts as done: a
job's one output here is its stamp, which the command takes away when something that the job was made from has changed.
Snakemake deletes the outputs of a failed job; like this it can delete nothing that anyone worked for.
"""

import os
from pathlib import Path

from grpo_engage.run.cores import job_threads
from grpo_engage.run.graph import STAMP, job_needs, stage_folder
from grpo_engage.run.resources import job_resource

# The interpreter comes from the environment: another name of it is no reason to do anything again.
JOB = 'exec "${{GRPO_ENGAGE_PYTHON:-python}}" -m grpo_engage job'
# On a cluster Snakemake reads this again where the job runs; the cores are those that the job was submitted with.
CORES = int(os.environ.get("GRPO_ENGAGE_CORES") or workflow.cores)


def stamps(stage, arm="", seed=None):
    """The stamps of the jobs whose files this one reads."""
    return [str(stage_folder(Path(), *job) / STAMP) for job in job_needs(config, stage, arm, seed)]


def asked(name, stage):
    """What a job of `stage` asks of a cluster; on one machine Snakemake minds only what --resources limits."""
    def of(wildcards, attempt):
        arm, seed = (wildcards.arm, int(wildcards.seed)) if stage == "train" else ("", None)
        return job_resource(config, name, stage, arm, seed, attempt)

    return of


rule data:
    output:
        f"data/{STAMP}",
    threads: job_threads(config, "data", CORES)
    resources:
        mem_mb=asked("mem_mb", "data"),
        runtime=asked("runtime", "data"),
        gpu=asked("gpu", "data"),
    shell:
        JOB + " data"


rule heuristic_reward:
    input:
        stamps("heuristic_reward"),
    output:
        f"heuristic_reward/{STAMP}",
    threads: job_threads(config, "heuristic_reward", CORES)
    resources:
        mem_mb=asked("mem_mb", "heuristic_reward"),
        runtime=asked("runtime", "heuristic_reward"),
        gpu=asked("gpu", "heuristic_reward"),
    shell:
        JOB + " heuristic_reward"


rule reward_model:
    input:
        stamps("reward_model"),
    output:
        f"reward_model/{STAMP}",
    threads: job_threads(config, "reward_model", CORES)
    resources:
        mem_mb=asked("mem_mb", "reward_model"),
        runtime=asked("runtime", "reward_model"),
        gpu=asked("gpu", "reward_model"),
    shell:
        JOB + " reward_model"


rule policy:
    input:
        stamps("policy"),
    output:
        f"policy/{STAMP}",
    threads: job_threads(config, "policy", CORES)
    resources:
        mem_mb=asked("mem_mb", "policy"),
        runtime=asked("runtime", "policy"),
        gpu=asked("gpu", "policy"),
    shell:
        JOB + " policy"


rule best_of_n:
    input:
        stamps("best_of_n"),
    output:
        f"best_of_n/{STAMP}",
    threads: job_threads(config, "best_of_n", CORES)
    resources:
        mem_mb=asked("mem_mb", "best_of_n"),
        runtime=asked("runtime", "best_of_n"),
        gpu=asked("gpu", "best_of_n"),
    shell:
        JOB + " best_of_n"


rule train:
    input:
        lambda wildcards: stamps("train", wildcards.arm, int(wildcards.seed)),
    output:
        f"train/{{arm}}/seed{{seed}}/{STAMP}",
    wildcard_constraints:
        arm="[a-z_0-9]+",
        seed="[0-9]+",
    threads: job_threads(config, "train", CORES)
    resources:
        mem_mb=asked("mem_mb", "train"),
        runtime=asked("runtime", "train"),
        gpu=asked("gpu", "train"),
    shell:
        JOB + " train --arm {wildcards.arm} --seed {wildcards.seed}"


rule evaluation:
    input:
        stamps("evaluation"),
    output:
        f"evaluation/{STAMP}",
    threads: job_threads(config, "evaluation", CORES)
    resources:
        mem_mb=asked("mem_mb", "evaluation"),
        runtime=asked("runtime", "evaluation"),
        gpu=asked("gpu", "evaluation"),
    shell:
        JOB + " evaluation"


rule paper:
    default_target: True
    input:
        stamps("paper"),
    output:
        f"paper/{STAMP}",
    threads: job_threads(config, "paper", CORES)
    resources:
        mem_mb=asked("mem_mb", "paper"),
        runtime=asked("runtime", "paper"),
        gpu=asked("gpu", "paper"),
    shell:
        JOB + " paper"
