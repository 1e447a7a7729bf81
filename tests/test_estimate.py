"""Before a run: what it will cost, from prices that a trial measures, or from what an earlier run recorded."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from grpo_engage.base.core import write_json
from grpo_engage.base.environment import usable_cores
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.run.cli import main
from grpo_engage.run.cores import clock_seconds, job_threads
from grpo_engage.run.costs import Counts, Spent, cost, fitted, spent_by, this_machine, work
from grpo_engage.run.estimate import beside, due, print_known
from grpo_engage.run.graph import job_needs, jobs, stage_folder
from grpo_engage.run.settings import load_preset, resolve_config

TINY = ["max_steps=3", "n_test_posts=4", "n_validation_posts=4", "n_samples=16", "n_boot=200", "max_new_tokens=8",
        "allow_unvalidated_reward=true", "best_of_n_posts=2", "best_of_n_replies=16", "rivals=[real]",
        "temperatures=[]", "embeddings=false", "watch_posts=2", "arms=[baseline, grpo]", "judge_backbone=minilm",
        "evaluation.batch_size=16", "policy=nano"]
COUNTS = Counts(30_000, {"validation": 540, "test": 360}, judged=9_000)


def settings(*changes, preset="smoke"):
    return resolve_config(load_preset(preset), changes) | {"preset": preset}


@pytest.mark.parametrize(("job", "name", "unit"), [
    (("train", "grpo", 0), "train.grpo.max_steps", "step"), (("best_of_n", "", None), "best_of_n_posts", "post")])
def test_twice_the_work_is_twice_the_part_that_varies(job, name, unit):
    done = [work(settings(f"{name}={n}", "watch_every=0"), job, COUNTS) for n in (32, 64)]
    price = {name: Spent(7.0, 8.0, 9.0) if name == "job" else Spent() for name in done[0]} | {unit: Spent(2.0, 3.0)}
    once, twice = (cost(price, units) for units in done)
    assert twice.wall - 7 == 2 * (once.wall - 7) == 2 * 2 * 32
    assert twice.memory == once.memory == 9


def test_the_evaluation_samples_as_many_batches_as_its_pieces_have():
    few, many = (work(settings(f"n_test_posts={n}"), ("evaluation", "", None), COUNTS) for n in (32, 64))
    assert many["batch"] - few["batch"] == 4 * (1 + 4 * 3)  # base, and four arms at three temperatures: 4 and 8 batches
    assert many["load"] == few["load"] == 13 + 4 * 3 and many["post"] - few["post"] == 32


def test_prices_are_those_that_made_the_trials():
    """Three unknown prices, any trials, against numpy's own solution of the equations."""
    random = np.random.default_rng(0)
    for _ in range(50):
        units = np.column_stack([np.ones(3), [600, 2100, 800], [15, 15, 45]]) * random.uniform(1, 1.2, (3, 3))
        true = random.uniform(0, 5, (3, 3)) * [[1], [1e-2], [1e-1]]  # wall, CPU and memory of each of three units
        trials = [({"job": a, "reply": b, "tried post": c}, Spent(*(row @ true)))
                  for row, (a, b, c) in zip(units, units.tolist(), strict=True)]
        found = fitted(trials)
        expected = np.linalg.solve(units, units @ true)
        np.testing.assert_allclose([[found[unit].wall, found[unit].cpu, found[unit].memory] for unit in found],
                                   expected, rtol=1e-5, atol=1e-7)


def test_every_preset_has_work_for_every_job():
    for preset in ("smoke", "pheme-cpu", "gpu", "judges"):
        config = settings(preset=preset)
        for job in jobs(config):
            units = work(config, job, COUNTS)
            assert units["job"] == 1 and all(n >= 0 for n in units.values()), (preset, job)


# A trial takes minutes, so what asks for one is slow; the parts of the forecast are asked about without.
@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """The command on a small file of an odd name; and the folders that it might have left something in."""
    place = tmp_path_factory.mktemp("estimate")
    folder = place / "{x} 'q' \"d\" $HOME `id` [a] # é\n"
    for path in (folder, place / "temporary", place / "runs"):
        path.mkdir()
    data = folder / "{} mine.jsonl"
    pairs = simulate_pairs(130, seed=3)
    columns = ["tweet", "reply", "reply_likes", "reply_retweets", "tweet_likes", "reply_author_followers",
               "reply_time_diff_seconds", "conversation_id"]
    pairs[columns].to_json(data, orient="records", lines=True)
    words = [word for text in TINY for word in ("-p", text)]
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "estimate", "--preset", "smoke", "--data", str(data),
                           "--price", "3.6", *words], capture_output=True, text=True, timeout=1500, cwd=place,
                          env=os.environ | {"TMPDIR": str(place / "temporary"),
                                            "GRPO_ENGAGE_RUNS": str(place / "runs")})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place, folder, done.stdout


def rows_of(text):
    """The table as job -> its numbers."""
    found = (re.match(r"\s*(\S.*?)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)$", line) for line in text.splitlines())
    return {line[1]: [float(line[place]) for place in (2, 3, 4, 5)] for line in found if line}


@pytest.mark.slow
def test_the_command_has_a_line_for_each_stage_and_arm(trial):
    rows = rows_of(trial[2])
    assert list(rows) == ["data", "heuristic_reward", "reward_model", "policy", "best_of_n", "train baseline seed 0",
                          "train grpo seed 0", "evaluation", "paper", "the whole run"]
    whole = rows.pop("the whole run")
    assert abs(whole[0] - sum(row[0] for row in rows.values())) <= 6  # rounded seconds
    assert whole[2] == max(row[2] for row in rows.values()) and whole[2] > 0.2
    assert abs(whole[3] - whole[0] / 1000) <= 0.01  # 3.6 US dollars an hour
    assert all(seconds > 1 for seconds, *_ in rows.values())  # a start of a job alone takes longer


@pytest.mark.slow
def test_the_command_leaves_no_file_behind(trial):
    place, folder, _ = trial
    assert [*(place / "runs").iterdir()] == [] and len([*folder.iterdir()]) == 1
    left = [path.name for path in (place / "temporary").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # torch's own, at every import


@pytest.mark.parametrize("words", [
    ["--preset", "smokey"], [], ["--preset", "smoke", "--price", "-1"], ["--preset", "smoke", "--price", "nan"],
    ["--preset", "smoke", "-p", "sed=1"], ["--compare", "../up"], ["--compare", "no such run"],
    ["--preset", "smoke", "--data", "/no/such/file.csv"], ["--preset", "smoke", "--data", "a folder without data"],
    ["--preset", "smoke", "--data", "a\0b"], ["--preset", "pheme-cpu"]])
def test_what_cannot_be_is_refused_before_anything_is_tried(words, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder without data").mkdir()
    assert main(["estimate", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def finished(run_dir, config, job, seconds, **facts):
    folder, threads = stage_folder(run_dir, *job), job_threads(config, job[0], usable_cores())
    write_json(run_dir / "config.json", config)
    write_json(folder / "manifest.json", {"status": "completed", "wall_seconds": seconds - 1, "job_seconds": seconds,
                                          "hardware": this_machine(threads)} | facts)


def test_a_run_is_known_from_an_earlier_one_that_did_the_same(tmp_path, capsys):
    config, same = settings("threads=0"), settings("threads=0", "seed=3", "train.grpo.learning_rate_policy=0.1")
    for number, job in enumerate(jobs(config)):
        finished(tmp_path / "old", config, job, 100.0 + number)
    print_known(tmp_path / "new", same, due(same, [], "paper"))
    said = capsys.readouterr().out
    assert "as it was in old" in said and "not known" not in said
    assert re.search(r"the whole run +1155 ", said)  # 11 jobs: 100 + ... + 110
    other = settings("threads=0", "train.grpo.max_steps=41", "train.hybrid.num_generations=4")
    print_known(tmp_path / "new", other, due(other, [], "paper"))
    assert "not known: train grpo, train hybrid\n" in capsys.readouterr().out


def test_what_another_machine_or_version_recorded_does_not_count(tmp_path, capsys):
    config = settings()
    job = ("data", "", None)
    finished(tmp_path / "far", config, job, 100.0, hardware=this_machine() | {"cpu_count": 999})
    finished(tmp_path / "failed", config, job, 100.0, status="failed")
    write_json(tmp_path / "old" / "config.json", {"arms": [], "seeds": [], "stages": {"data": {"a": 1}}})
    write_json(tmp_path / "old" / "data" / "manifest.json", {"status": "completed", "wall_seconds": 1})
    print_known(tmp_path / "new", config, [job])
    assert "not known" in capsys.readouterr().out


def test_the_comparison_is_of_the_jobs_that_ended(tmp_path):
    config = settings()
    finished(tmp_path, config, ("data", "", None), 50.0, cpu_seconds=40.0, peak_memory=2e9)
    shown = beside({job: Spent(40.0, 30.0, 1e9) for job in jobs(config)}, tmp_path, config)
    assert shown["job"].tolist() == ["data", "the whole run"] and shown["ratio"].tolist() == [0.8, 0.8]
    assert shown.loc[0, ["real_cpu", "real_gb"]].tolist() == [40.0, 2.0]


def test_the_clock_of_jobs_side_by_side_keeps_the_bounds_of_every_schedule():
    """No schedule is shorter than the longest chain or than the work over the cores; a list schedule with jobs of one
    thread is at most their sum (Graham 1969)."""
    random = np.random.default_rng(0)
    for _ in range(100):
        config = settings("n_seeds=2") | {"threads": 1}
        seconds = {job: float(random.uniform(1, 100)) for job in jobs(config)}
        cores = int(random.integers(1, 9))

        def chain(job, config=config, seconds=seconds):
            return seconds[job] + max((chain(other) for other in job_needs(config, *job)), default=0.0)

        longest = max(map(chain, seconds))
        whole = sum(spent * job_threads(config, job[0], cores) for job, spent in seconds.items()) / cores
        found = clock_seconds(seconds, config, cores)
        assert max(longest, whole) <= found + 1e-9 and found <= longest + whole + 1e-9
        assert clock_seconds(seconds, config | {"threads": 0}, cores) == pytest.approx(sum(seconds.values()))


def test_a_manifest_of_before_is_helped_out_by_its_notebook(tmp_path):
    write_json(tmp_path / "manifest.json", {"status": "completed", "wall_seconds": 4.0})
    notebook = {"cells": [], "metadata": {"papermill": {"duration": 6.5}}}
    (tmp_path / "stage.ipynb").write_text(json.dumps(notebook))
    assert spent_by(tmp_path).wall == 6.5 and pd.isna(spent_by(tmp_path).memory)
