"""What goes wrong in a run, through the command line: told in a few lines, and the next run goes on from there.

A file of its own, so that a second process of `make test` can take it while the first is at test_run.py.
"""

import gzip
import json

import pytest
from test_run import COMMAND, call

from grpo_engage.base.core import read_json
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.run.cli import main

# what is learned plays no part here
FEW = ["-p", "reward_model.members=1", "-p", "reward_model.epochs=1", "-p", "policy=nano"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_failing_cell_is_explained_and_the_next_run_resumes(runs, tmp_path):
    """A user's own file with a broken line; the gravest case, one reply a post, is in test_reward_model.py."""
    path, folder = tmp_path / "own.jsonl.gz", runs / "own"
    rows = simulate_pairs(120, 5).drop(columns=["source"]).to_dict("records")
    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps(row | {"meta": {}}) + "\n" for row in rows)
        handle.write("{broken\n")
    command = [*COMMAND, "reward_model", "--run", "own", "--data", str(path), *FEW]
    done = call(runs, *command, "-p", "covariates=[meta.verified]")
    assert done.returncode == 1
    assert "stage reward_model" in done.stderr and "cell" in done.stderr and "meta.verified" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) < 12, done.stderr
    assert read_json(folder / "reward_model" / "manifest.json")["status"] == "failed"
    assert list((folder / "reward_model").glob("*.ipynb"))
    rejected = (folder / "data" / "rejected.csv").read_text().splitlines()
    assert len(rejected) == 2 and rejected[1].startswith(f"{len(rows) + 1},")
    assert (folder / "data" / "data_card.md").read_text(encoding="utf-8").startswith("# Data card")
    before = [read_json(folder / stage / "manifest.json") for stage in ("data", "heuristic_reward")]

    done = call(runs, *command)
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "reward_model" / "manifest.json")["status"] == "completed"
    assert before == [read_json(folder / stage / "manifest.json") for stage in ("data", "heuristic_reward")]


@pytest.mark.parametrize(("words", "message"), [
    (["-p", "max_stps=3"], "did you mean 'max_steps'?"),
    (["-p", "max_steps=three"], "must be of type int"),
    (["-p", "temperature=nan"], "temperature"),
    (["-p", "openai_api_key=x"], "looks like a secret"),
    (["--run", "../elsewhere"], "is no name for a run"),
])
def test_what_a_user_gets_wrong_is_one_line(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", str(tmp_path / "runs"))
    assert main([*COMMAND[3:], *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_and_nothing_stands_beside_that_line(runs):
    """From the command line itself: no warning of a library, no traceback."""
    done = call(runs, *COMMAND, "-p", "max_stps=3")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
