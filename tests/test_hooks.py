"""The git filter that `make install` sets: outputs of notebooks stay out of commits, and nothing else is touched."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from grpo_engage.base.core import REPO_ROOT

SCRIPT = REPO_ROOT / "hooks" / "clean_notebook.py"
NOTEBOOK = "nbs/text/03_diversity.ipynb"


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("clean_notebook", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder, *arguments, **options):
    """What git says in `folder`, with no settings of the user."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(folder)}
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.invalid", *arguments], cwd=folder,
                          env=os.environ | own, check=True, capture_output=True, text=True, **options)


@pytest.fixture
def checkout(tmp_path):
    """A repository of its own with the filter's files and one notebook, committed; under a name with a space."""
    folder = tmp_path / "my checkout 🎩"
    for name in (NOTEBOOK, "hooks/clean_notebook.py", ".gitattributes", "settings.ini"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO_ROOT / name, folder / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    git(folder, "init", "-q")
    git(folder, "add", NOTEBOOK, "hooks", ".gitattributes", "settings.ini")
    git(folder, "commit", "-qm", "begin")
    return folder


def run_and_saved(path):
    """The notebook as JupyterLab leaves it: executed, with outputs, counts and its own metadata."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.11.0"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        cell["execution_count"] = number + 1
        cell["metadata"]["collapsed"] = True
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["a person's words\n"]}]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path.read_bytes()


def test_what_is_committed_has_no_outputs_and_the_file_keeps_them(checkout, hook):
    assert "git cleans notebooks" in hook.install(checkout)
    saved = run_and_saved(checkout / NOTEBOOK)
    git(checkout, "add", NOTEBOOK)
    assert git(checkout, "diff", "--cached", "--stat").stdout == ""  # nothing to commit: the source is what it was
    assert git(checkout, "status", "--porcelain").stdout.split() in ([], ["??", ".venv/"])
    assert (checkout / NOTEBOOK).read_bytes() == saved


def test_without_the_filter_outputs_would_be_committed(checkout):
    run_and_saved(checkout / NOTEBOOK)
    git(checkout, "add", NOTEBOOK)
    assert "a person's words" in git(checkout, "diff", "--cached").stdout


def test_a_changed_cell_is_committed(checkout, hook):
    hook.install(checkout)
    run_and_saved(checkout / NOTEBOOK)
    text = (checkout / NOTEBOOK).read_text(encoding="utf-8").replace("# Diversity", "# Diversity, ünd", 1)
    (checkout / NOTEBOOK).write_text(text, encoding="utf-8")
    git(checkout, "commit", "-qam", "a word")
    shown = git(checkout, "show", "--format=").stdout
    assert "ünd" in shown and "a person's words" not in shown and "language_info" not in shown


def test_a_missing_environment_and_a_broken_notebook_stop_nobody(checkout, hook):
    hook.install(checkout)
    (checkout / NOTEBOOK).write_text("<<<<<<< ours\n", encoding="utf-8")
    said = git(checkout, "add", NOTEBOOK).stderr
    assert "is no notebook and was not cleaned" in said
    assert git(checkout, "show", f":{NOTEBOOK}").stdout == "<<<<<<< ours\n"
    shutil.rmtree(checkout / ".venv")
    (checkout / NOTEBOOK).write_text("{}\n", encoding="utf-8")
    git(checkout, "add", NOTEBOOK)
    assert git(checkout, "show", f":{NOTEBOOK}").stdout == "{}\n"


def test_installing_touches_the_filter_alone_and_no_repository_around(checkout, hook, tmp_path, monkeypatch):
    git(checkout, "config", "core.hooksPath", "mine")
    before = git(checkout, "config", "--local", "--list").stdout
    hook.install(checkout)
    hook.install(checkout)
    after = git(checkout, "config", "--local", "--list").stdout
    assert after == before + f"filter.{hook.FILTER}.clean={hook.COMMAND}\n"
    inside = checkout / "unpacked"  # an archive of this project, unpacked within somebody's repository
    inside.mkdir()
    assert "no checkout of git" in hook.install(inside)
    assert "no checkout of git" in hook.install(tmp_path)
    assert git(checkout, "config", "--local", "--list").stdout == after
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no git here" in hook.install(checkout)


def test_committed_notebooks_are_what_the_filter_makes_of_them(hook):
    for path in sorted((REPO_ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")):
        text = path.read_text(encoding="utf-8")
        assert ".ipynb_checkpoints" in path.parts or hook.cleaned(text) == text, path


def test_files_are_cleaned_in_place(checkout, hook):
    before = (checkout / NOTEBOOK).read_bytes()
    run_and_saved(checkout / NOTEBOOK)
    assert hook.clean_files(checkout / "nbs") == [checkout / NOTEBOOK]
    assert (checkout / NOTEBOOK).read_bytes() == before and hook.clean_files(checkout / "nbs") == []
