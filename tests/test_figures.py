"""The committed figures, tables and published paper are what the committed results give, byte for byte."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.paper.published_sources import read_sources
from grpo_engage.paper.study import RESULTS, read_results

COMMITTED = {Path(path) for path in (
    "docs/figures/frontier.png", "docs/figures/ladder.png", "docs/figures/growth.png",
    "docs/figures/over_training.png", "paper/study/main.pdf",
    "outputs/published/over_training/answers.csv", "outputs/published/over_training/means.csv",
    "outputs/published/over_training/checks.csv", "outputs/published/over_training_second/answers.csv")}


def test_figures_tables_and_paper_come_again_from_the_committed_results(tmp_path):
    begun = time.perf_counter()
    subprocess.run([sys.executable, str(REPO_ROOT / "benchmarks" / "figures.py"), "--out", str(tmp_path)], check=True)
    assert time.perf_counter() - begun < 180  # a minute on an idle machine; the tests share theirs
    missing = [str(path) for path in COMMITTED if not (tmp_path / path).exists()]
    assert missing == []
    assert [str(path) for path in COMMITTED if (REPO_ROOT / path).read_bytes() != (tmp_path / path).read_bytes()] == []


def test_every_result_of_the_paper_is_recorded_as_it_is():
    sources = read_sources(REPO_ROOT)  # refuses a file that is gone or has changed
    assert set(read_results(REPO_ROOT, sources)) == set(RESULTS)
    assert [name for name, entry in sources.items() if not (REPO_ROOT / entry["notebook"]).exists()] == []


def test_every_result_of_the_paper_names_a_commit_of_this_history():
    def git(*words):
        return subprocess.run(["git", *words], cwd=REPO_ROOT, capture_output=True, text=True, check=False)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no whole history here")
    unknown = {name: entry["commit"] for name, entry in read_sources(REPO_ROOT).items()
               if git("cat-file", "-e", f"{entry['commit']}^{{commit}}").returncode}
    assert unknown == {}


@pytest.mark.parametrize("path", sorted(RESULTS.values()))
def test_a_result_that_was_changed_by_hand_stops_the_paper(path, tmp_path):
    """In a copy of the results, one more byte in one file."""
    recorded = {file for entry in read_sources(REPO_ROOT).values() for file in entry["files"]}
    for each in ("outputs/published/sources.json", *recorded):
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_bytes((REPO_ROOT / each).read_bytes())
    read_sources(tmp_path)
    with open(tmp_path / path, "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=f"{Path(path).name} .* is not the file that was recorded"):
        read_sources(tmp_path)
