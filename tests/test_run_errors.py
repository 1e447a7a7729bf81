"""What goes wrong in a run, through the command line: told in a few lines, and the next run goes on from there.

A file of its own, so that a second process of `make test` can take it while the first is at test_run.py.
"""

import gzip
import json

import pytest
from test_run import COMMAND, call

from grpo_engage.base.core import read_json
from grpo_engage.data.simulator import simulate_pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_failing_cell_is_explained_and_the_next_run_resumes(runs, tmp_path):
    path = tmp_path / "own.jsonl.gz"
    rows = simulate_pairs(120, 5).drop(columns=["meta", "source"]).to_dict("records")
    lonely = {row["conversation_id"]: row for row in rows}  # one reply to each post: nothing to compare
    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in lonely.values())
    command = [*COMMAND, "--run", "own", "--data", str(path), "-p", "min_replies_per_post=1"]
    done = call(runs, *command)
    assert done.returncode == 1
    assert "stage reward_model" in done.stderr and "cell" in done.stderr and "two replies" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) < 12, done.stderr
    assert read_json(runs / "own" / "reward_model" / "manifest.json")["status"] == "failed"
    assert list((runs / "own" / "reward_model").glob("*.ipynb"))

    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
        handle.write("{broken\n")
    done = call(runs, *command[:4], "reward_model", *command[4:])
    assert done.returncode == 0, done.stderr
    assert read_json(runs / "own" / "reward_model" / "manifest.json")["status"] == "completed"
    rejected = (runs / "own" / "data" / "rejected.csv").read_text().splitlines()
    assert len(rejected) == 2 and rejected[1].startswith(f"{len(rows) + 1},")


@pytest.mark.parametrize(("words", "message"), [
    (["-p", "max_stps=3"], "did you mean 'max_steps'?"),
    (["-p", "max_steps=three"], "must be of type int"),
    (["-p", "temperature=nan"], "temperature"),
    (["-p", "openai_api_key=x"], "looks like a secret"),
    (["--run", "../elsewhere"], "is no name for a run"),
])
def test_what_a_user_gets_wrong_is_one_line(runs, words, message):
    done = call(runs, *COMMAND, *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
