"""The committed figures and tables are what the committed results give, byte for byte."""

import subprocess
import sys
from pathlib import Path

from grpo_engage.base.core import REPO_ROOT


def test_figures_and_tables_come_again_from_the_committed_results(tmp_path):
    subprocess.run([sys.executable, str(REPO_ROOT / "benchmarks" / "figures.py"), "--out", str(tmp_path)], check=True)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {Path("docs/figures/frontier.png"), Path("docs/figures/ladder.png")} <= set(made)
    assert [str(path) for path in made if (REPO_ROOT / path).read_bytes() != (tmp_path / path).read_bytes()] == []
