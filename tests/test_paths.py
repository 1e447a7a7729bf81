"""A path with any characters in it, from the user's folder: no language that it passes through may read it.

Snakemake reads {braces}, papermill fills them in, glob reads [brackets], make and the shell read $, YAML and TeX more.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import yaml

from grpo_engage.base.core import REPO_ROOT, file_sha256, read_json
from grpo_engage.base.processes import launch_command
from grpo_engage.base.storage import check_writable, whole_path
from grpo_engage.data.reading import read_pairs
from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.evaluation.arm_files import arm_file_name, file_replies
from grpo_engage.paper.pdf import build_pdf
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.run.cli import main, run_folder
from grpo_engage.run.execution import execute_notebook
from grpo_engage.run.graph import outside_files
from grpo_engage.run.settings import STAGES, load_preset, resolve_config, user_parameters

ODD = ("a  b 'q' \"d\" $HOME ${x} $(id) `id` {x} {wildcards.x} {0} {} {n,[0-9]+} [a] (b) *? #h %p %(s)s &amp; ;s \\n "
       "\\x ! | < > ~ = @ , : é e\u0301 日本 👩\u200d💻 ")
NAMES = {"all in one": ODD, "line break, blank first": " new\nline", "dash first": "-rf {", "tilde first": "~no one }",
         "long": "長" * 80, "decomposed": unicodedata.normalize("NFD", "été"), "blanks": "  "}
each_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def checkout(place):
    """A copy of what a run needs of the repository in the new folder `place`."""
    for name in ("grpo_engage", "nbs", "configs", "paper", "Snakefile", "settings.ini"):
        source = REPO_ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, place / name)
    return place


def call(place, folder, *words, **environment):
    """The command line of the checkout `place`, typed in `folder`."""
    # a path with a colon cannot be in PYTHONPATH: the program says itself where its modules are
    program = ("import os, runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
               "runpy.run_module('grpo_engage', run_name='__main__', alter_sys=True)")
    return subprocess.run([sys.executable, "-c", program, str(place), *words], cwd=folder, capture_output=True,
                          text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(place)} | environment)


def test_a_run_whose_every_path_is_odd(tmp_path, base):
    """Checkout, the user's folder, runs and models folders, run, preset, data and policy: all but two are relative.

    One name is everything at once: odd, with a blank first, a line break, and as long as a folder's may be beside an
    ending. What the path of a checkout may not have is a colon: venv refuses it too.
    """
    name = " {" + ODD.replace(":", "").rstrip() + "\nline "
    name += "長" * ((240 - len(name.encode())) // 3)
    assert len(name.encode()) > 230
    place, here = checkout(tmp_path / name), tmp_path / name / "here" / name
    (here / name).mkdir(parents=True)
    simulate_pairs(40, 5).drop(columns=["meta", "source"]).to_csv(here / name / "posts [1].csv", index=False)
    (here / name / "my {preset}.yaml").write_text("extends: smoke\n")
    shutil.copytree(base, here / name / "policy")
    shutil.copytree(base, here / name / "models" / base.name)  # building it takes a minute and a half
    run = name.replace("\n", "")
    done = call(place, here, "run", "policy", f"--preset={name}/my {{preset}}.yaml", f"--run={run}",
                f"--data={name}/posts [1].csv", "-p", f"policy.policy={name}/policy",
                GRPO_ENGAGE_RUNS=f"{name}/runs", GRPO_ENGAGE_MODELS=f"{name}/models")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run_dir = here / name / "runs" / run
    assert read_json(run_dir / "policy" / "policy.json")["sha256"] == file_sha256(base / "model.safetensors")
    manifest = read_json(run_dir / "data" / "manifest.json")
    assert manifest["parameters"]["data_path"] == str(here / name / "posts [1].csv")
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["grpo_engage", "nbs", "configs", "paper", "Snakefile", "settings.ini", "here"])  # nothing beside


@each_name
def test_a_relative_path_is_taken_from_the_users_folder(tmp_path, monkeypatch, name):
    (tmp_path / "real").mkdir()
    (tmp_path / name).symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert whole_path(name, "policy") == tmp_path / name and whole_path(f"./{name}/x", "x") == tmp_path / name / "x"
    check_writable(Path(name) / "runs")
    pairs = simulate_pairs(6, 5).drop(columns=["meta", "source"])
    for ending, write in ((".csv", pd.DataFrame.to_csv), (".parquet", pd.DataFrame.to_parquet)):
        write(pairs, Path(name) / f"{name}{ending}", index=False)
        assert len(read_pairs(f"{name}/{name}{ending}")[0]) == len(pairs)
    files = [f"{name}/{name}.csv", f"{name}/{name}.parquet"]
    values = ["data.source=file", f"data.data_path={files[0]}", f"policy.policy={name}",
              f"evaluation.arm_files={json.dumps(files)}"]
    (tmp_path / "real" / f"{name}.yaml").write_text("extends: smoke\nn_seeds: 2\n")
    (tmp_path / "real" / "above.yaml").write_text(yaml.safe_dump({"extends": f"{name}.yaml"}, allow_unicode=True))
    config = resolve_config(load_preset(f"{name}/above.yaml"), values)
    assert len(config["seeds"]) == 2 and ensure_policy(name) == tmp_path / name
    monkeypatch.chdir(REPO_ROOT / "nbs")  # where the stages work
    found = [path for stage in ("data", "policy", "evaluation") for path in outside_files(config, stage).values()]
    assert found == [tmp_path / path for path in (files[0], name, *files)] and all(path.exists() for path in found)


@each_name
def test_a_file_of_replies_with_any_name_is_an_arm(tmp_path, name):
    path = tmp_path / name / f"{name}.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"post": "7", "text": "Is that so?"}) + "\n")
    arm = arm_file_name(path, [])
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,39}", arm)
    replies, _ = file_replies(path, arm, 0, pd.DataFrame({"post": ["7"]}), {"7"}, 1)
    assert replies["text"].tolist() == ["Is that so?"]


@each_name
def test_papermill_and_typst_take_the_name_as_it_is(tmp_path, name):
    folder = tmp_path / name
    (folder / "tables").mkdir(parents=True)
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [],
            "execution_count": None}
    notebook = {"cells": [cell | {"source": "place = ''"}, cell | {"id": "b", "metadata": {}, "source":
                "from pathlib import Path\n(Path(place) / 'mark').write_text(str(Path.cwd()))"}],
                "metadata": {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
                "nbformat": 4, "nbformat_minor": 5}
    (folder / "x.ipynb").write_text(json.dumps(notebook))
    execute_notebook(folder / "x.ipynb", folder / "done.ipynb", {"place": str(folder)}, "stage x")
    assert (folder / "mark").read_text() == str(folder) and (folder / "done.ipynb").exists()
    (folder / "tables" / "x.tex").write_text("forty-two")
    (folder / "main.tex").write_text("\\documentclass{article}\n\\begin{document}\n\\input{tables/x.tex}\n"
                                     "\\end{document}\n")
    build_pdf(folder, "typst")
    assert "forty-two" in (folder / "main.typ").read_text() and (folder / "main.pdf").read_bytes()[:4] == b"%PDF"


# make itself takes blanks from the front of a value, and a recipe of make is lines
@pytest.mark.parametrize("name", [name for name in NAMES.values() if name == name.lstrip()])
def test_make_hands_the_words_on(tmp_path, name):
    shutil.copy(REPO_ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    for target, words in (("run", [f"PRESET={name}", f"DATA={name}", f"RUN={name}"]), ("paper", [f"RUN={name}"])):
        done = subprocess.run(["make", "-s", "-o", ".venv/.ready", target, *words], cwd=tmp_path, text=True, timeout=60,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        given = {word.partition("=")[0]: word.partition("=")[2] for word in json.loads(done.stdout)[3:]}
        assert set(given.values()) == {name}, done.stdout


def test_every_parameter_that_names_files_says_so():
    named = {name for stage in STAGES for name, entry in user_parameters(stage).items() if entry.metadata["path"]}
    told = {name for stage in STAGES for name, entry in user_parameters(stage).items()
            if {"file", "files", "folder", "paths"} & set(entry.metadata["help"].replace(".", " ").split())}
    assert named == told and named == {"data_path", "policy", "accelerate_config", "arm_files", "safety_classifier"}


def test_a_name_of_a_model_or_of_our_own_file_stays_one(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    given = resolve_config(load_preset("smoke"), ["accelerate_config=configs/accelerate/fsdp.yaml"])
    assert given["stages"]["policy"]["policy"] == "nano" and outside_files(given, "policy") == {}
    assert given["stages"]["train"]["grpo"]["accelerate_config"] == "configs/accelerate/fsdp.yaml"
    (tmp_path / "my {x}.yaml").write_text("{}")
    own = resolve_config(load_preset("smoke"), ["accelerate_config=my {x}.yaml", "policy.policy=Some/model"])
    path = own["stages"]["train"]["grpo"]["accelerate_config"]
    assert str(tmp_path / "my {x}.yaml") in launch_command(2, ["-m", "x"], path)
    assert own["stages"]["policy"]["policy"] == "Some/model"


@pytest.mark.parametrize(("words", "said"), [
    (["--preset", "smoke", "-p", "policy.policy=./not {there}"], "policy='"),
    (["--preset", "smoke", "--data", "not {there}.csv"], "--data not {there}.csv"),
    (["--preset", "not {there}.yaml"], "preset 'not {there}.yaml'"),
    (["--preset", "zero.yaml"], r"policy='a\x00b'"),
    (["--preset", "zero data.yaml"], r"data_path='a\x00b'"),
    (["--preset", "smoke", "--run", "a/b"], "--run"),
    (["--preset", "smoke", "--run", "a\nb"], r"'a\nb'"),
    (["--preset", "smoke", "--run", "é" * 128], "255 bytes"),
    (["--preset", "smoke", "--data", "caf\udce9.csv"], "--data='caf"),
])
def test_what_cannot_be_is_refused_in_one_line_that_names_it(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", "runs")
    (tmp_path / "zero.yaml").write_text('policy: {policy: "a\\0b"}\n')
    (tmp_path / "zero data.yaml").write_text('data: {source: file, data_path: "a\\0b"}\n')
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "runs").exists(), error


@each_name
def test_a_run_may_be_called_by_any_name_of_a_folder(name):
    if "\n" in name:
        name = name.replace("\n", "")
    assert run_folder(name).name == name


def test_folders_of_the_environment_are_named_when_they_cannot_be(monkeypatch, capsys):
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", "/caf\udce9")
    assert main(["list"]) == 2 and "GRPO_ENGAGE_RUNS='/caf" in capsys.readouterr().err
