"""What a command, a module and a stage's kernel load before they do anything: libraries that take seconds come late.

What was loaded does not depend on how busy the machine is, so that is what is asserted; CPU seconds (not those on the
clock) have a bound far above what was measured, against a regression that no name here tells of.
"""

import ast
import json
import os
import resource
import subprocess
import sys

import pandas as pd
import pytest

from grpo_engage.base.core import REPO_ROOT, read_json
from grpo_engage.run.listing import as_table
from grpo_engage.run.settings import STAGES, notebook_of

MODELS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sentence_transformers")
ANALYSIS = ("scipy", "sklearn", "statsmodels", "matplotlib", "seaborn")
RUNNING = ("papermill", "nbformat", "jupyter_client", "jsonschema", "IPython", "snakemake")
LOADED = """
import json, sys
{code}
print("LOADED", json.dumps(sorted({{name.partition(".")[0] for name in sys.modules if sys.modules[name]}})))
"""


def loaded(code, cwd=REPO_ROOT):
    """The packages in a fresh interpreter after `code`, and the CPU seconds that it took from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", LOADED.format(code=code)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return set(json.loads(done.stdout.rpartition("LOADED ")[2])), seconds


# but near_pairs, which `splitting` imports when it looks for near-copies
DATA = sorted(path.stem for path in (REPO_ROOT / "grpo_engage" / "data").glob("[!_]*.py") if path.stem != "near_pairs")


def test_the_room_of_the_data_is_light():
    found, seconds = loaded("\n".join(f"import grpo_engage.data.{name}" for name in DATA))
    assert "pandas" in found and found & {*MODELS, *ANALYSIS, *RUNNING} == set()
    assert seconds < 3  # .6 was measured


@pytest.mark.parametrize("words", [["--help"], ["list"], ["check", "--preset", "smoke", "--settings"],
                                   ["params", "data"]])
def test_a_command_that_only_answers_is_light(words, tmp_path):
    code = f"""
import os
os.environ["GRPO_ENGAGE_RUNS"] = {str(tmp_path)!r}
from grpo_engage.run.cli import main
try:
    assert main({words!r}) == 0
except SystemExit as end:
    assert end.code == 0
"""
    found, seconds = loaded(code)
    assert "yaml" in found and found & {*MODELS, *ANALYSIS, *RUNNING, "pandas"} == set()
    assert seconds < 3  # .4 was measured


def test_the_graph_is_light():
    """Snakemake reads it at the start of each run."""
    found, _ = loaded("import grpo_engage.run.graph")
    assert found & {*MODELS, *ANALYSIS, *RUNNING, "pandas"} == set()


def test_a_job_does_not_load_the_grammar_of_web_addresses():
    found, _ = loaded("import grpo_engage.run.execution")
    assert "papermill" in found and "rfc3987_syntax" not in found and found & {*MODELS, *ANALYSIS} == set()


def imports_of(stage):
    """All that the cells of a stage's notebook import at their top level, as one program."""
    cells = read_json(notebook_of(stage))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = ("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))) for source in sources)
    return "\n".join(ast.unparse(node) for text in lines for node in ast.parse(text).body
                     if isinstance(node, (ast.Import, ast.ImportFrom)))


# What the start of a stage does without. Those that sample or train load transformers, for a model's classes.
WITHOUT = {"data": {*MODELS, *ANALYSIS}, "heuristic_reward": {*MODELS, "seaborn", "statsmodels"},
           "reward_model": {*MODELS, "seaborn", "statsmodels"} - {"torch"}, "paper": {*MODELS},
           "policy": {"trl", "datasets", "seaborn", "statsmodels"},
           "best_of_n": {"trl", "datasets", "seaborn", "statsmodels"}}


@pytest.mark.parametrize("stage", WITHOUT)
def test_the_start_of_a_stage_is_light(stage):
    assert stage in STAGES
    found, _ = loaded(imports_of(stage))
    assert "pandas" in found and found & WITHOUT[stage] == set()


def test_the_stage_of_the_data_and_its_manifest_do_without_torch(tmp_path):
    found, _ = loaded(f"from pathlib import Path\nfrom grpo_engage.data.pairs import data_stage\n"
                      f"data_stage(Path({str(tmp_path)!r}), n_conversations=30)")
    assert found & {*MODELS} == set()
    record = read_json(tmp_path / "data" / "manifest.json")["hardware"]
    assert record["gpus"] is None and record["threads"] == 1


def test_the_list_of_runs_is_what_pandas_would_print():
    rows = [{"run": "a", "status": "completed", "minutes": 1.5}, {"run": "long name", "status": "empty"},
            {"run": "b", "status": "failed in data", "minutes": 12.0, "pass@10 grpo": 0.125}]
    ours = [line.split() for line in as_table(rows).splitlines()]
    theirs = [line.split() for line in pd.DataFrame(rows).to_string(index=False, na_rep="").splitlines()]
    assert ours == theirs and len({*map(len, as_table(rows).splitlines())}) == 1
