"""The whole path through the command line, Snakemake and papermill, at seconds-long size: done, changed, killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from grpo_engage.base.core import REPO_ROOT, models_dir, read_json
from grpo_engage.base.environment import usable_cores
from grpo_engage.run.graph import job_reads, job_writes, jobs, reasons, stage_folder

TINY = ["n_conversations=120", "max_steps=3", "n_test_posts=4", "n_validation_posts=4", "n_samples=16",
        "n_boot=200", "max_new_tokens=16", "allow_unvalidated_reward=true", "best_of_n_posts=4", "best_of_n_replies=16",
        "rivals=[real]", "temperatures=[]", "embeddings=false", "watch_posts=2", "arms=[baseline, grpo]",
        "threads=0"]  # one job at a time
COMMAND = [sys.executable, "-m", "grpo_engage", "run", "--preset", "smoke"]
STAGES = ["data", "heuristic_reward", "reward_model", "policy", "best_of_n", "train/baseline/seed0",
          "train/grpo/seed0", "evaluation", "paper"]


def arguments(run, *more, tiny=TINY):
    return [*COMMAND, "--run", run, *[word for text in tiny for word in ("-p", text)], *more]


def call(runs, *words, timeout=900):
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"GRPO_ENGAGE_RUNS": str(runs)})


def manifests(run_dir):
    return {stage: read_json(run_dir / stage / "manifest.json") for stage in STAGES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(runs):
    done = call(runs, *arguments("first"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "first", done


def test_a_run_leaves_notebook_manifest_and_tidy_files(finished):
    run_dir, done = finished
    for stage, manifest in manifests(run_dir).items():
        assert manifest["status"] == "completed", stage
        assert manifest["versions"]["torch"] and manifest["wall_seconds"] > 0 and "commit" in manifest["git"]
        assert len(list((run_dir / stage).glob("*.ipynb"))) == 1, stage
    for name in ("data/pairs.parquet", "data/rejected.csv", "evaluation/generations.parquet", "evaluation/metrics.csv",
                 "paper/macros.tex", "paper/main.pdf"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "paper" / "main.pdf").read_bytes().startswith(b"%PDF")
    header = (run_dir / "evaluation" / "metrics.csv").read_text().splitlines()[0]
    assert header == "arm,seed,metric,value,ci_low,ci_high,n,warning"
    assert "loss" in done.stdout and "reward" in done.stdout  # the plain answer at the end


def test_four_test_posts_are_shouted_wherever_the_numbers_are_shown(finished, runs):
    """The pilot of four posts whose gibberish was said to beat people, without a word of warning."""
    run_dir, done = finished
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "No evidence: nothing can be concluded from this run" in page and "<strong>4 test posts</strong>" in page
    assert page.count("<img ") == page.count('<img src="data:image/png;base64,') == 4 and "<script" not in page
    assert done.stdout.count("NO EVIDENCE: nothing can be concluded from this run (4 test posts; ") == 1
    assert "note: " not in done.stdout and str(run_dir / "report.html") in done.stdout.splitlines()[-1]
    listed = call(runs, *COMMAND[:3], "list")
    assert "4 test posts; " in listed.stdout
    metrics = pd.read_csv(run_dir / "evaluation" / "metrics.csv")
    assert metrics.loc[metrics["n"] > 0, "warning"].str.contains("4 posts: fewer than 20|[123] posts").all()
    assert all("4 test posts" in path.read_text() for path in (run_dir / "paper" / "tables").glob("*.tex"))
    assert (run_dir / "evaluation" / "recommendation.txt").read_text().startswith("Iterate: only 4 test posts")
    assert any("only 4 test posts" in said for said in read_json(run_dir / "evaluation" / "manifest.json")["cautions"])


def test_every_figure_of_an_executed_notebook_is_a_picture(finished):
    run_dir, _ = finished
    shown = {}
    for path in run_dir.rglob("*.ipynb"):
        data = [output.get("data", {}) for cell in nbformat.read(path, as_version=4).cells
                for output in cell.get("outputs", ())]
        assert [entry for entry in data if "<Figure" in entry.get("text/plain", "") and "image/png" not in entry] == []
        shown[path.stem] = sum("image/png" in entry for entry in data)
    assert shown["07_hybrid"] == 2 and shown["08_evaluation"] >= 2, shown


@pytest.fixture
def beside_the_run(finished, tmp_path):
    """A folder where the finished run lies as `make paper` would leave it."""
    (tmp_path / "outputs" / "runs").mkdir(parents=True)
    (tmp_path / "outputs" / "runs" / "smoke").symlink_to(finished[0])
    return tmp_path


def test_readme_the_learned_reward_in_a_stock_trainer(beside_the_run, readme_scripts, run_script):
    run_script(readme_scripts[1], beside_the_run, """
from trl import GRPOTrainer
trainer = of["trainer"]
assert type(trainer) is GRPOTrainer and trainer.state.global_step == 3
rewards = [entry["rewards/learned/mean"] for entry in trainer.state.log_history if "reward" in entry]
assert len(rewards) == 3 and all(0 < reward < 1 for reward in rewards), rewards
""")


def test_readme_a_trained_adapter_without_the_package(beside_the_run, readme_scripts, run_script):
    """It samples from what was trained, with the prompt of its training."""
    printed = run_script(readme_scripts[2], beside_the_run, """
import sys, inspect
assert not any(name.startswith("grpo_engage") for name in sys.modules)
assert max(abs(p).max() for name, p in of["model"].named_parameters() if "lora_B" in name) > 0
from grpo_engage import format_prompt
system, user = (message["content"] for message in of["messages"])
assert system == inspect.signature(format_prompt).parameters["instruction"].default
assert of["tokenizer"](format_prompt(user, of["tokenizer"]))["input_ids"] == of["inputs"]["input_ids"][0].tolist()
""")
    assert len(printed.splitlines()) == 4 and all(line.strip() for line in printed.splitlines())


def without_training(run_dir, copy):
    """A copy of a finished run that has yet to train."""
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("train", "best_of_n", "evaluation", "paper"))
    return copy


def trained_bytes(run_dir):
    """Name -> content of what training left, adapters and logs."""
    found = [*run_dir.glob("train/*/*/train_log.csv"), *run_dir.glob("train/*/*/adapter/adapter_model.safetensors")]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow  # a minute; tests/test_processes.py compares two processes with one in each fast run
def test_training_in_two_processes_is_a_parameter(runs, finished):
    without_training(finished[0], runs / "processes")
    done = call(runs, *arguments("processes", "-p", "arms=[baseline]", "-p", "n_processes=2", "--", "train"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "baseline: 2 processes start" in done.stdout
    folder = runs / "processes" / "train" / "baseline" / "seed0"
    assert pd.read_csv(folder / "train_log.csv")["step"].tolist() == [1, 2, 3]
    looks = pd.read_csv(folder / "watch.csv")
    assert looks["step"].tolist() == [0, 3]  # nothing was trained before the first one: it is that of one process
    assert looks[:1].equals(pd.read_csv(finished[0] / "train" / "baseline" / "seed0" / "watch.csv")[:1])
    assert not (folder / "checkpoints").exists() and not (folder / "processes").exists()


def test_a_stage_needs_nothing_but_what_the_graph_says_that_it_reads(finished, tmp_path):
    """Evaluation, which reads most, in a folder with those files alone: the same bytes as in the whole run."""
    run_dir, config = finished[0], read_json(finished[0] / "config.json")
    shutil.copy(run_dir / "config.json", tmp_path)
    for name in job_reads(config, "evaluation"):
        source = run_dir / name.partition("#")[0].rstrip("?")
        if name.endswith("?") and not source.exists():
            continue
        target = tmp_path / source.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    threads = str(usable_cores())  # what Snakemake gives a job
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "job", "evaluation"], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    assert done.returncode == 0, done.stderr
    for name in job_writes("evaluation", "", None):
        assert (tmp_path / name).read_bytes() == (run_dir / name).read_bytes(), name


def test_what_the_stages_say_that_they_read_stands_in_the_graph(finished):
    run_dir, config = finished[0].resolve(), read_json(finished[0] / "config.json")
    for job in jobs(config):
        inputs = read_json(stage_folder(run_dir, *job) / "manifest.json")["inputs"]
        inside = {Path(path).relative_to(run_dir).as_posix() for path in inputs if Path(path).is_relative_to(run_dir)}
        assert inside - {name.partition("#")[0] for name in job_reads(config, *job)} == set(), job


def test_the_log_is_no_flood(finished):
    _, done = finished
    assert len(done.stdout.splitlines()) < 400 and "\r" not in done.stdout


def test_the_same_command_again_finds_nothing_to_do(runs, finished):
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.ipynb")}
    start = time.monotonic()
    assert call(runs, *arguments("first")).returncode == 0
    assert time.monotonic() - start < 20
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.ipynb")}


def test_a_changed_parameter_redoes_what_depends_on_it_and_the_result_is_the_same_bytes(runs, finished):
    run_dir, _ = finished
    before, metrics = manifests(run_dir), (run_dir / "evaluation" / "metrics.csv").read_bytes()
    changed = arguments("first", "-p", "n_boot=300")
    settings = (run_dir / "config.json").read_bytes()
    plan = call(runs, *changed, "--dry-run")
    assert plan.returncode == 0 and "evaluation" in plan.stdout and "rule train" not in plan.stdout
    assert (run_dir / "config.json").read_bytes() == settings and not (run_dir / ".dry-run.json").exists()
    assert call(runs, *changed).returncode == 0
    after = manifests(run_dir)
    redone = {stage for stage in STAGES if before[stage]["started"] != after[stage]["started"]}
    assert redone == {"evaluation", "paper"}
    assert (run_dir / "evaluation" / "metrics.csv").read_bytes() != metrics
    assert call(runs, *arguments("first", "--", "evaluation")).returncode == 0  # back to the first value
    assert (run_dir / "evaluation" / "metrics.csv").read_bytes() == metrics


def _wait_for(condition, what, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.2)


def _in_stage(run_dir, stage):
    path = run_dir / stage / "manifest.json"
    return path.exists() and read_json(path)["status"] == "running"


def _kernels(command):
    return [process for process in psutil.Process(command.pid).children(recursive=True)
            if "ipykernel_launcher" in " ".join(process.cmdline())]


@pytest.mark.slow  # three minutes; tests/test_survival.py has a kill -9 in each fast run
def test_killed_command_and_killed_kernel_go_on_to_the_same_bytes(runs, finished):
    run_dir = without_training(finished[0], runs / "killed")
    environment = os.environ | {"GRPO_ENGAGE_RUNS": str(runs)}

    # kill -9 on the command while it trains: nothing of it lives on, and Snakemake's lock is left behind
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = subprocess.Popen(arguments("killed"), env=environment, **quiet)
    _wait_for(lambda: _in_stage(run_dir, "train/baseline/seed0"), "training")
    tree = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGKILL)
    command.wait()
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert alive == []
    assert not (run_dir / "evaluation" / "metrics.csv").exists()

    # the same command goes on; now the kernel alone dies
    heard = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = subprocess.Popen(arguments("killed"), env=environment, **heard)
    _wait_for(lambda: _in_stage(run_dir, "train/grpo/seed0"), "the grpo arm")
    kernels = _kernels(command)
    assert len(kernels) == 1
    kernels[0].send_signal(signal.SIGKILL)
    _, message = command.communicate(timeout=400)
    assert command.returncode == 1 and "the kernel died" in message and "grpo" in message
    failed = read_json(run_dir / "train" / "grpo" / "seed0" / "manifest.json")
    assert failed["status"] == "failed"
    listing = call(runs, sys.executable, "-m", "grpo_engage", "list").stdout
    assert "failed in train/grpo/0" in listing and "completed" in listing

    # and the same command ends where an undisturbed run ends (evaluation and paper have nothing left to show)
    done = call(runs, *arguments("killed", "--", "train"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert trained_bytes(run_dir) == trained_bytes(finished[0])


@pytest.mark.slow  # `run/26_cores` says how jobs are set side by side; this asks Snakemake
def test_arms_side_by_side_give_the_bytes_of_one_after_another(runs, finished):
    made, spans = {}, {}
    for cores in ("1", "2"):
        run_dir = without_training(finished[0], runs / f"cores{cores}")
        words = arguments(run_dir.name, "-p", "arms=[baseline, polychromic]", "-p", "threads=1", "--", "train")
        done = subprocess.run(words, capture_output=True, text=True, timeout=900,
                              env=os.environ | {"GRPO_ENGAGE_RUNS": str(runs), "OMP_NUM_THREADS": cores})
        assert done.returncode == 0, done.stderr[-3000:]
        made[cores] = trained_bytes(run_dir)
        records = [read_json(path) for path in sorted((run_dir / "train").glob("*/seed0/manifest.json"))]
        assert [record["hardware"]["threads"] for record in records] == [1, 1]
        starts = [datetime.fromisoformat(record["started"]).timestamp() for record in records]
        spans[cores] = [(start, start + record["wall_seconds"]) for start, record in zip(starts, records, strict=True)]
    assert made["1"] == made["2"] and len(made["1"]) == 4
    (first, second), (one, other) = sorted(spans["1"]), sorted(spans["2"])
    assert second[0] >= first[1] - 1 and other[0] < one[1]


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def elsewhere(runs, finished, tmp_path_factory):
    """The finished run, packed here and unpacked in another folder of runs."""
    archive, other = tmp_path_factory.mktemp("post") / "first 😀.tar.gz", tmp_path_factory.mktemp("elsewhere")
    done = call(runs, *COMMAND[:3], "pack", "first", "--out", str(archive))
    assert done.returncode == 0, done.stderr
    assert call(other, *COMMAND[:3], "unpack", str(archive)).returncode == 0
    return other


def test_a_packed_run_holds_no_path_of_this_machine(runs, elsewhere):
    places = [str(path).encode() for path in (runs, REPO_ROOT, models_dir(), Path(sys.prefix), Path.home())
              if len(path.parts) > 2]
    named = {path.relative_to(elsewhere).as_posix() for path in files_in(elsewhere)
             if any(place in path.read_bytes() for place in places)}
    assert named == set() and len(files_in(elsewhere)) > 100


@pytest.mark.slow  # a paper once more
def test_a_packed_run_is_listed_and_makes_its_paper_elsewhere(runs, finished, elsewhere):
    listed = [[line.split() for line in call(place, *COMMAND[:3], "list").stdout.splitlines()]
              for place in (runs, elsewhere)]
    assert [words for words in listed[0] if words[0] == "first"] == listed[1][1:]
    config = read_json(elsewhere / "first" / "config.json")
    for job in jobs(config)[:-1]:  # a rewritten manifest is no changed one
        assert reasons(elsewhere / "first", config, *job) == reasons(finished[0], config, *job), job
    shutil.rmtree(elsewhere / "first" / "paper")
    (elsewhere / "first" / ".libraries").mkdir()  # as the command that starts jobs would
    done = subprocess.run([*COMMAND[:3], "job", "paper"], cwd=elsewhere / "first", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    macros = [(place / "first" / "paper" / "macros.tex").read_text() for place in (runs, elsewhere)]
    assert macros[0] == macros[1] and (elsewhere / "first" / "paper" / "main.pdf").read_bytes().startswith(b"%PDF")


def test_a_packed_run_replies_elsewhere_as_it_did_here(runs, elsewhere):
    asked = [*COMMAND[:3], "reply", "--run", "first", "--arm", "grpo", "-n", "4", "--json", "late again 😀\x1b[2J"]
    done = [call(place, *asked) for place in (runs, elsewhere)]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert done[0].stdout == done[1].stdout and "\x1b" not in done[0].stderr + done[0].stdout
    found = json.loads(done[0].stdout)
    assert [row["rank"] for row in found["replies"]] == [1, 2, 3, 4] and all(r["generated"] for r in found["replies"])
    rewards = [row["reward"] for row in found["replies"]]
    assert rewards == sorted(rewards, reverse=True) and all(0 <= row["judge"] <= 1 for row in found["replies"])
    streamed = [line.partition(" ")[2] for line in done[0].stderr.splitlines() if line[1:2] == "/"]
    assert sorted(streamed) == sorted(row["text"] or "[empty]" for row in found["replies"])


def test_compare_a_run_with_itself_and_with_one_whose_replies_pass_less(runs, finished, elsewhere, tmp_path):
    worse = elsewhere / "worse"
    shutil.copytree(elsewhere / "first", worse)
    path = worse / "evaluation" / "scores.parquet"
    scores = pd.read_parquet(path)
    grpo = (scores["arm"] == "grpo") & (scores["split"] == "test")
    scores.loc[grpo, "passed"] &= scores.loc[grpo, "sample"] % 2 == 0
    scores.to_parquet(path)
    for second, sign in (("first", 0), ("worse", -1)):
        target = tmp_path / f"{second}.csv"
        done = call(elsewhere, *COMMAND[:3], "compare", "first", second, "--csv", str(target))
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(target).set_index(["arm", "metric"])
        assert (table.loc["baseline", "difference"] == 0).all()
        assert table.loc[("grpo", "self_bleu"), "difference"] == 0
        found = table.loc[("grpo", "pass@1")]
        assert np.sign(found["difference"]) == sign and found["over"] == "posts, of one trained seed"
    assert "parameters that differ: 0" in done.stdout
