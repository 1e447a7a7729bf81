"""The repository itself: modules are what the notebooks export, notebooks are clean, every module stands alone."""

import filecmp
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.run.runner import stale_modules
from grpo_engage.run.settings import STAGES, load_preset, resolve_config


def _names(folder, ending):
    """The files of `folder` by their path in it, without their ending; nothing hidden."""
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob(f"*{ending}"))
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


NOTEBOOKS = _names(REPO_ROOT / "nbs", ".ipynb")
MODULES = [name.replace("/", ".") for name in _names(REPO_ROOT / "grpo_engage", ".py")
           if not name.rpartition("/")[2].startswith("_")]
BIN = Path(sys.executable).parent


@pytest.fixture
def checkout(tmp_path):
    for name in ("nbs", "grpo_engage"):
        shutil.copytree(REPO_ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(REPO_ROOT / name, tmp_path / name)
    return tmp_path


def test_modules_are_what_the_notebooks_export(checkout):
    before = {path: path.read_bytes() for path in (checkout / "grpo_engage").rglob("*.py")}
    for path in before:
        if path.name != "__init__.py":
            path.unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=checkout, check=True, capture_output=True)
    after = {path: path.read_bytes() for path in (checkout / "grpo_engage").rglob("*.py")}
    assert sorted(after) == sorted(before)
    assert [path for path in before if before[path] != after[path]] == []


def test_a_changed_cell_is_seen(checkout):
    assert stale_modules(checkout) == []
    path = checkout / "grpo_engage" / "base" / "core.py"
    path.write_text(path.read_text().replace("every_seconds: float = 30.0", "every_seconds: float = 60.0"))
    assert len(stale_modules(checkout)) == 1


def test_notebooks_are_clean(checkout):
    subprocess.run([BIN / "nbdev_clean"], cwd=checkout, check=True, capture_output=True)
    names = [f"{name}.ipynb" for name in NOTEBOOKS]
    assert filecmp.cmpfiles(REPO_ROOT / "nbs", checkout / "nbs", names, shallow=False)[1:] == ([], [])


def read(notebook):
    return json.loads((REPO_ROOT / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_names_only_notebooks_that_there_are(name):
    text = "\n".join("".join(cell["source"]) for cell in read(name)["cells"]).replace("nbs/", "")
    assert set(re.findall(r"(?<![\w/])(?:[a-z]+/)?\d\d[a-z]{0,2}_[a-z_]+\b", text)) - set(NOTEBOOKS) == set()
    assert re.findall(r"[nN]otebooks? \d\d[a-z]{0,2}\b(?!_)", text) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs_on_the_common_kernel(name):
    notebook = read(name)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(not cell["outputs"] and cell["execution_count"] is None
               for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not any("eval: false" in "".join(cell["source"]) for cell in notebook["cells"])


IMPORT_EACH = """
import importlib, json, multiprocessing, sys, traceback
import datasets, peft, scipy.stats, seaborn, sklearn, statsmodels.api, torch
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOTrainer, RewardTrainer

def attempt(name):
    assert not any(module.startswith("grpo_engage") for module in sys.modules), "not alone"
    try:
        importlib.import_module(f"grpo_engage.{name}")
        assert "nbdev" not in sys.modules and "fastcore" not in sys.modules, "nbdev or fastcore was loaded"
        return ""
    except BaseException:
        return traceback.format_exc()

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(dict(zip(sys.argv[1:], pool.map(attempt, sys.argv[1:], chunksize=1)))))
"""


@pytest.fixture(scope="module")
def imported():
    """What went wrong for each module, imported in a process of its own: forked from one that holds torch and the like,
    which take ten seconds to import."""
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *MODULES, "__main__"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*MODULES, "__main__"])
def test_module_imports_alone(name, imported):
    assert not imported[name], imported[name]


@pytest.mark.parametrize("name", MODULES)
def test_module_is_of_a_readable_size(name):
    assert len((REPO_ROOT / "grpo_engage" / f"{name.replace('.', '/')}.py").read_text().splitlines()) <= 320


@pytest.mark.parametrize("preset", sorted(path.stem for path in (REPO_ROOT / "configs").glob("*.yaml")))
def test_preset_is_valid(preset):
    config = resolve_config(load_preset(preset))
    assert set(config["stages"]) == set(STAGES)


def test_license_and_readme_show_the_two_commands():
    readme = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    assert "make paper" in readme and "make test" in readme
    assert "Apache License" in (REPO_ROOT / "LICENSE").read_text(encoding="utf-8")


def test_a_demonstration_leaves_no_folder_behind():
    """Neither in a process of its own, as a kernel is, nor in a worker, as nbdev_test has."""
    program = ("from multiprocessing import get_context\n"
               "from grpo_engage.base.core import demo_run_dir\n"
               "def show(): print(demo_run_dir(), flush=True)\n"
               "show()\n"
               "worker = get_context('fork').Process(target=show)\n"
               "worker.start()\n"
               "worker.join()\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    folders = [Path(line) for line in done.stdout.split()]
    assert len(set(folders)) == 2 and [path for path in folders if path.exists()] == []


def test_every_bug_of_the_list_can_still_be_planted():
    """`make planted` takes hours, so nobody would see that an entry's code is gone."""
    specification = importlib.util.spec_from_file_location("planted", REPO_ROOT / "proofs" / "planted.py")
    planted = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(planted)
    bugs = planted.read_bugs()
    assert len(bugs) > 150
    for bug in bugs:
        assert len(planted.planted(REPO_ROOT, bug)) == 2, bug["name"]
