"""What tests share: the smallest policy, a few simulated posts, the scripts that the README shows."""

import os
import re
import subprocess
import sys

import pytest

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy


@pytest.fixture(scope="module")
def base():
    return ensure_policy("nano")


@pytest.fixture(scope="module")
def pairs():
    return simulate_pairs(30, seed=8)[["tweet", "reply"]]


@pytest.fixture(scope="session")
def readme_scripts():
    """The README's three: own reward and data; the learned reward in stock TRL; a trained adapter without us."""
    readme = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(scripts) == 3
    return scripts


@pytest.fixture(scope="session")
def run_script():
    """Runs a script as printed, in `folder`, then `checks`, which see its names in `of`; returns what it printed."""

    def run(script, folder, checks):
        (folder / "script.py").write_text(script, encoding="utf-8")
        program = f"import runpy\nof = runpy.run_path('script.py', run_name='__main__')\n{checks}"
        paths = [str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=600,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    return run
