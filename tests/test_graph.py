"""What does a stage again, and what does not: each case on a finished run, in a copy of the checkout.

The stages themselves are replaced: instead of executing a notebook, papermill writes small files (`STAND_IN`). All the
rest is real: command line, Snakemake, jobs, manifests.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager
from nbdev.clean import clean_jupyter

from grpo_engage.base.core import REPO_ROOT, read_json, stage_manifest, write_json
from grpo_engage.base.source_code import definitions_used
from grpo_engage.run.runner import stale_modules
from grpo_engage.run.settings import STAGES, notebook_of

# What a stage "computes" depends on these parameters alone: others change the recipe and not the result.
STAND_IN = r'''
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.modules["rfc3987_syntax"] = None  # jsonschema does without; loading it takes a second of each process
import papermill

# the report of what no stage computed says nothing, and loads pandas
sys.modules["grpo_engage.evaluation.report"] = SimpleNamespace(write_report=lambda run_dir: run_dir / "report.html")
sys.modules["grpo_engage.run.data_card"] = SimpleNamespace(
    write_card=lambda run_dir: run_dir / "data" / "data_card.md", run_card=None, add_card_arguments=lambda parser: None)
TELLS = {"data": ["n_conversations"], "train": ["max_steps"], "evaluation": ["n_boot"]}


def execute_notebook(notebook, executed, parameters, **_):
    from grpo_engage.run.graph import job_writes, stage_folder
    from grpo_engage.run.settings import STAGES, notebook_of
    stage = next(stage for stage in STAGES if notebook_of(stage).name == Path(notebook).name)
    job = (stage, parameters.get("arm", "") if stage == "train" else "", parameters.get("seed"))
    run_dir = Path(parameters["run_dir"])
    for name in job_writes(*job):
        path = run_dir / name.rstrip("?")
        if not path.suffix:
            path = path / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {key: parameters[key] for key in TELLS.get(stage, [])}
        text = json.dumps({"verdicts": {}, "text": "trained", "job": job} | said)
        path.write_text(text if path.suffix != ".csv" else f"arm,metric,value,short\n,{text.replace(',', ';')},0,\n")
    folder = stage_folder(run_dir, *job)
    for name in ("checkpoints", "figures", "tables"):
        (folder / name).mkdir(exist_ok=True)
    count = folder / "executed.txt"
    count.write_text(count.read_text() + "x" if count.exists() else "x")
    facts = {name: value for name, value in parameters.items() if name not in ("run_dir", "keep_checkpoints")}
    (folder / "manifest.json").write_text(json.dumps({"status": "completed", "parameters": facts, "wall_seconds": 1}))


papermill.execute_notebook = execute_notebook
'''
PLAN = '''
import json, sys
from pathlib import Path
from grpo_engage.base.core import read_json
from grpo_engage.run.graph import jobs, reasons, standing
run_dir, config = Path(sys.argv[1]), read_json(Path(sys.argv[1]) / "config.json")
for text in sys.argv[2:]:
    *place, name, value = text.replace("=", ".", 1).split(".", text.count(".", 0, text.index("=")) + 1)
    where = config["stages"]
    for key in place:
        where = where[key]
    where[name] = json.loads(value)
why = {job: reasons(run_dir, config, *job) for job in jobs(config)}
stand = standing(config, [job for job in why if not why[job]])
print(json.dumps([[list(job), why[job], job in stand] for job in why]))
'''
SETTINGS = ["arms=[baseline, grpo]", "n_test_posts=4", "policy=nano"]
TREE = ("nbs", "grpo_engage", "configs", "paper", "Snakefile", "settings.ini")


class Place:
    """A checkout and a folder of runs."""

    def __init__(self, folder: Path, tree: str = "tree", runs: str = "runs"):
        self.folder, self.tree, self.runs = folder, folder / tree, folder / runs

    def environment(self) -> dict:
        return os.environ | {"PYTHONPATH": f"{self.folder / 'stand_in'}{os.pathsep}{self.tree}",
                             "PYTHONDONTWRITEBYTECODE": "1", "GRPO_ENGAGE_RUNS": str(self.runs)}

    def command(self, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess:
        given = [word for text in SETTINGS for word in ("-p", text)]
        done = subprocess.run([python, "-m", "grpo_engage", "run", "--preset", "smoke", "--run", "one", *given,
                               "--data", str(self.folder / "posts.csv"), *words], cwd=self.folder, text=True,
                              capture_output=True, env=self.environment())
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def plan(self, *changes: str, run: str = "one") -> dict[str, list[str]]:
        """The jobs that would not stand, by name, with their own reasons (none: only one before them changed)."""
        done = subprocess.run([sys.executable, "-c", PLAN, str(self.runs / run), *changes], cwd=self.folder, text=True,
                              capture_output=True, env=self.environment())
        assert done.returncode == 0, done.stderr[-3000:]
        return {"/".join(str(part) for part in job if part not in ("", None)): why
                for job, why, stands in json.loads(done.stdout) if not stands}

    def executed(self, run: str = "one") -> dict[str, int]:
        paths = sorted((self.runs / run).rglob("executed.txt"))
        return {path.parent.relative_to(self.runs / run).as_posix(): len(path.read_text()) for path in paths}


EVERYTHING = {"data", "heuristic_reward", "reward_model", "policy", "best_of_n", "train/baseline/0", "train/grpo/0",
              "evaluation", "paper"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("graph"))
    for name in TREE:
        source = REPO_ROOT / name
        if source.is_dir():
            shutil.copytree(source, place.tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, place.tree / name)
    (place.folder / "stand_in").mkdir()
    (place.folder / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
    (place.folder / "posts.csv").write_text("tweet,reply\na,b\n")
    place.command()
    assert set(place.executed().values()) == {1} and len(place.executed()) == len(EVERYTHING)
    return place


@contextlib.contextmanager
def edited(path: Path, old: str, new: str):
    """`path` with `old` replaced, then as it was."""
    before = path.read_bytes()
    assert old in before.decode(), f"{old!r} is not in {path}"
    path.write_text(before.decode().replace(old, new, 1))
    try:
        yield
    finally:
        path.write_bytes(before)


def test_a_finished_run_is_finished_under_every_name_of_the_interpreter(place):
    for python in (sys.executable, str(Path(sys.executable).with_name("python3"))):
        assert "Nothing to be done" in place.command("--dry-run", python=python).stdout


# -- the cases that the old graph got wrong


def test_a_change_of_child_seed_reaches_everything(place):
    with edited(place.tree / "grpo_engage/base/core.py", "digest()[:4]", "digest()[:3]"):
        assert set(place.plan()) == EVERYTHING
        said = place.command("--dry-run").stdout
    assert "data is due again: code changed: base.core" in said
    assert len(re.findall(r"^rule (\w+):", said, re.MULTILINE)) == len(EVERYTHING)


def test_a_changed_bootstrap_level_reaches_the_gate_and_the_evaluation(place):
    with edited(place.tree / "grpo_engage/stats/intervals.py", "level: float = 0.95", "level: float = 0.9"):
        found = place.plan()
    assert found["reward_model"] == found["evaluation"] == ["code changed: stats.intervals"]
    assert "data" not in found and "policy" not in found


def test_prose_changes_nothing(place):
    path = place.tree / "nbs/rewards/07_validation.ipynb"
    notebook = json.loads(path.read_text())
    text = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")["source"][-1]
    with edited(path, json.dumps(text, ensure_ascii=False)[1:-1], "Another sentence."):
        assert place.plan() == {}


def autosave(root: Path, name: str, hook=None) -> None:
    """Save a notebook that nobody touched, as JupyterLab does: with what its kernel says of itself."""
    manager = FileContentsManager(root_dir=str(root), **({"pre_save_hook": hook} if hook else {}))
    content = manager.get(name, content=True, type="notebook")["content"]
    content["metadata"] |= {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py",
                          "mimetype": "text/x-python", "name": "python", "nbconvert_exporter": "python",
                          "pygments_lexer": "ipython3", "version": "3.11.99"}}
    for cell in content["cells"]:
        cell["metadata"]["trusted"] = True
    manager.save({"type": "notebook", "format": "json", "content": content}, name)


@pytest.mark.parametrize("name", ["nbs/train/01_advantages.ipynb", "nbs/07_hybrid.ipynb"])
def test_jupyterlab_saving_an_untouched_notebook_changes_nothing(place, name):
    path = place.tree / name
    before = path.read_bytes()
    try:
        autosave(place.tree, name)
        assert path.read_bytes() != before and place.plan() == {}  # by whatever editor: nothing is done again
    finally:
        path.write_bytes(before)
    autosave(place.tree, name, clean_jupyter)  # and from `make lab` nothing is written but what was there
    assert path.read_bytes() == before
    assert "pre_save_hook=nbdev.clean.clean_jupyter" in (REPO_ROOT / "Makefile").read_text()
    # what JupyterLab keeps beside it is no notebook of ours
    assert list(path.parent.glob(".ipynb_checkpoints/*.ipynb"))
    assert stale_modules(place.tree) == []


def test_a_copied_and_renamed_checkout_changes_nothing(place, tmp_path):
    """Under a name that a shell, a format string or a wildcard would trip over; the run comes without its notes."""
    other = Place(tmp_path, "it's a $tree", "other {runs}")
    shutil.copytree(place.tree, other.tree, copy_function=shutil.copyfile)
    shutil.copytree(place.runs / "one", other.runs / "one", copy_function=shutil.copyfile,
                    ignore=shutil.ignore_patterns(".*", "*.log"))
    shutil.copytree(place.folder / "stand_in", other.folder / "stand_in")
    shutil.copy(place.folder / "posts.csv", other.folder / "posts.csv")
    assert "Nothing to be done" in other.command("--dry-run").stdout

    # a run that was brought home goes on: what is finished stays
    for name in ("evaluation", "paper"):
        shutil.rmtree(other.runs / "one" / name)
    other.command()
    assert other.executed() == place.executed()  # once each


# -- what is no reason


def test_other_times_change_nothing(place):
    for path in [*place.tree.rglob("*"), *(place.runs / "one").rglob("*"), place.folder / "posts.csv"]:
        os.utime(path)
    assert "Nothing to be done" in place.command("--dry-run").stdout


def test_another_clone_of_the_same_commit_changes_nothing(place, tmp_path):
    run = ["git", "-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    subprocess.run([*run, "init", "-q"], cwd=place.tree, check=True)
    subprocess.run([*run, "add", "-A"], cwd=place.tree, check=True)
    subprocess.run([*run, "commit", "-qm", "x"], cwd=place.tree, check=True)
    subprocess.run([*run, "clone", "-q", str(place.tree), str(tmp_path / "clone")], check=True)
    shutil.rmtree(place.tree / ".git")
    other = Place(place.folder)
    other.tree = tmp_path / "clone"
    assert other.plan() == {}


@pytest.mark.parametrize(("name", "old", "new"), [
    ("grpo_engage/base/core.py", "def child_seed", "# a comment\n\n\ndef child_seed"),
    ("grpo_engage/base/core.py", "A 32-bit seed for the random stream", "Thirty-two bits for the stream"),
    ("grpo_engage/run/demonstration.py", "BEFORE = {", "AFTER = {}\nBEFORE = {"),
    ("grpo_engage/judges/browser.py", "import ", "import abc\nimport "),
    ("nbs/judges/05_browser.ipynb", '"execution_count": null', '"execution_count": 7'),
    ("nbs/01_data.ipynb", '"metadata": {},\n   "outputs"', '"metadata": {"collapsed": true},\n   "outputs"'),
])
def test_comments_docstrings_demonstrations_and_what_is_not_used_change_nothing(place, name, old, new):
    with edited(place.tree / name, old, new):
        assert place.plan() == {}


def test_a_demonstration_cell_of_a_stage_changes_nothing_and_a_stage_cell_does(place):
    path = place.tree / "nbs" / notebook_of("reward_model").name
    before = path.read_bytes()
    notebook = json.loads(before)
    plain = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code" and not cell["metadata"].get("tags")
                 and not "".join(cell["source"]).startswith("#|"))
    stage = [cell for cell in notebook["cells"] if "stage" in cell["metadata"].get("tags", ())][-1]
    try:
        plain["source"] = ["shown = 1"]
        path.write_text(json.dumps(notebook))
        assert place.plan() == {}
        stage["source"] = [*stage["source"], "\n", "validation = None"]
        path.write_text(json.dumps(notebook))
        assert place.plan()["reward_model"] == ["code changed: its stage cells"]
    finally:
        path.write_bytes(before)


# -- what is a reason, and how far it reaches


def test_a_parameter_reaches_its_stage_and_what_its_result_reaches(place):
    found = place.plan("evaluation.n_boot=300")
    assert set(found) == {"evaluation", "paper"} and found["evaluation"] == ["n_boot was 2000, is 300"]
    found = place.plan("train.grpo.max_steps=7")
    assert set(found) == {"train/grpo/0", "evaluation", "paper"} and found["evaluation"] == []
    assert set(place.plan("train.baseline.max_steps=7")) == {"train/baseline/0", "train/grpo/0", "evaluation", "paper"}


def test_the_users_file_counts_by_what_is_in_it(place, tmp_path):
    copy = tmp_path / "elsewhere.csv"
    shutil.copyfile(place.folder / "posts.csv", copy)
    assert place.plan(f"data.data_path={json.dumps(str(copy))}") == {}
    with copy.open("a") as handle:
        handle.write("c,d\n")
    assert place.plan(f"data.data_path={json.dumps(str(copy))}")["data"] == ["data_path: has other content"]
    done = subprocess.run([sys.executable, "-m", "grpo_engage", "run", "--preset", "smoke", "--run", "one",
                           "-p", "data.source=file", "-p", "data.data_path=/nowhere.csv"], capture_output=True,
                          text=True, env=place.environment())
    assert done.returncode == 2 and done.stderr == "error: data: data_path='/nowhere.csv': there is no such file\n"


def test_files_of_other_systems_count_by_name_and_content(place, tmp_path):
    path = tmp_path / "rival.csv"
    path.write_text("post,text\n")
    assert set(place.plan(f"evaluation.arm_files={json.dumps([str(path)])}")) == {"evaluation", "paper"}


def test_the_papers_sources_count(place):
    with edited(place.tree / "paper/main.tex", "\\section", "More.\n\\section"):
        assert place.plan() == {"paper": ["paper/main.tex: has other content"]}


def test_a_file_that_somebody_changed_is_seen(place):
    with edited(place.runs / "one/reward_model/labels.parquet", "{", "{ "):
        found = place.plan()
    assert "is not the one that it wrote" in found["reward_model"][0] and "heuristic_reward" not in found
    assert found["train/grpo/0"] == ["reward_model/labels.parquet changed"]


def test_a_stage_that_was_run_by_hand_is_noticed_and_done_again(place):
    """Plain papermill into the run's folder, with other parameters: it writes what the stage's function writes."""
    folder = place.runs / "one" / "policy"
    with stage_manifest(folder, "policy", {"policy": "nano", "temperature": 0.5}):
        write_json(folder / "policy.json", {"name": "something else"})
    found = place.plan()
    assert found["policy"][0].startswith("it was done by hand") and "heuristic_reward" not in found
    before = place.executed()
    done = place.command()
    assert "policy is due again: it was done by hand" in done.stdout
    assert read_json(folder / "manifest.json")["parameters"]["temperature"] == 1.0
    # the stage wrote what it had written at first, so nothing after it is done again
    after = place.executed()
    assert {name for name in after if after[name] != before[name]} == {"policy"}
    assert "stage train (grpo, seed 0): nothing that it was made from has changed; kept" in done.stdout
    assert place.plan() == {}


def test_the_paper_of_a_run_that_changed_names_what_changed(place):
    shutil.copytree(place.runs / "one", place.runs / "two")
    path = place.runs / "two" / "policy" / "manifest.json"
    path.write_text(path.read_text().replace('"made_from"', '"lost"'))
    words = [sys.executable, "-m", "grpo_engage", "paper", "--run", "two"]
    done = subprocess.run(words, capture_output=True, text=True, env=place.environment())
    assert done.returncode == 0, done.stderr
    assert "policy is not what this run's settings, files and code give now (`run` does it again): it" in done.stdout
    ran = {name for name, times in place.executed("two").items() if times != place.executed()[name]}
    assert ran == {"paper"} and "paper/main.pdf is the paper of run 'two'" in done.stdout
    shutil.rmtree(place.runs / "two" / "evaluation")
    done = subprocess.run(words, capture_output=True, text=True, env=place.environment())
    assert done.returncode == 2 and done.stderr.startswith("error: two: the stage evaluation has not ended")


def test_a_job_that_failed_or_was_killed_is_done_again(place):
    path = place.runs / "one" / "best_of_n" / "manifest.json"
    for status, why in (("failed", "it failed"), ("running", "it did not end")):
        with edited(path, '"status": "completed"', f'"status": "{status}"'):
            assert place.plan()["best_of_n"] == [why]


def test_no_stage_reads_what_no_stage_writes(place):
    """That they read no more than this is tested on a real run, in `test_run.py`."""
    from grpo_engage.run.graph import READS, WRITES

    written = {f"{stage}/{name.rstrip('?')}" for stage, names in WRITES.items() for name in [*names, "manifest.json"]}
    assert {name.partition("#")[0].rstrip("?") for names in READS.values() for name in names} - written == set()
    assert set(READS) == set(WRITES) == set(STAGES)


# -- the cached model


def test_nano_is_keyed_by_the_code_that_builds_it(place):
    def code():
        return definitions_used("grpo_engage.policy.base_models", ["_build_nano"], place.tree)

    before = code()
    assert before == definitions_used("grpo_engage.policy.base_models", ["_build_nano"])  # by content, not by place
    for name, old, new, counts in [
            ("base/core.py", "digest()[:4]", "digest()[:3]", True),
            ("data/grammar.py", "0.14, 0.08, 0.3, 0.62", "0.14, 0.08, 0.4, 0.62", True),
            ("policy/base_models.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.99)", True),
            ("policy/base_models.py", "optimizer.step()", "optimizer.step()  # a step", False),
            ("base/core.py", "every_seconds: float = 30.0", "every_seconds: float = 60.0", True),
            ("base/plots.py", "#999999", "#998877", False)]:
        with edited(place.tree / "grpo_engage" / name, old, new):
            assert (code() != before) is counts, (name, old)


def test_nanos_key_takes_that_code_and_the_settings(monkeypatch):
    from grpo_engage.policy import base_models

    key = base_models.nano_key.__wrapped__
    before = key()
    assert before == base_models.nano_key()
    monkeypatch.setattr(base_models, "definitions_used", lambda *_: {"other": "code"})
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setitem(base_models.NANO, "steps", 1)
    assert key() != before
