"""The front door, `from grpo_engage import …`: what it holds and costs; and the README that shows it."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module

import pandas as pd
import pytest
from safetensors.numpy import load_file

import grpo_engage
from grpo_engage.base.core import REPO_ROOT

PACKAGE = REPO_ROOT / "grpo_engage"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FIRST_PAGE = sorted((REPO_ROOT / "nbs").glob("*.ipynb"))

COST = """
import sys, time
start = time.perf_counter()
import grpo_engage
print(time.perf_counter() - start)
heavy = [name for name in ("torch", "numpy", "pandas") if name in sys.modules]
assert not heavy, heavy
assert [name for name in sys.modules if name.startswith("grpo_engage")] == ["grpo_engage"]
"""


def test_importing_the_package_costs_nothing():
    """In fresh interpreters: the best of three, since two cores may be busy."""
    seconds = [float(subprocess.run([sys.executable, "-c", COST], cwd=REPO_ROOT, capture_output=True, text=True,
                                    check=True).stdout) for _ in range(3)]
    assert min(seconds) < 0.2


@pytest.mark.parametrize(("name", "module"), sorted(grpo_engage._MODULE.items()))
def test_a_name_is_what_its_module_defines(name, module):
    space = {}
    exec(f"from grpo_engage import {name}", space)
    found = space[name]
    assert found is getattr(import_module(f"grpo_engage.{module}"), name)
    assert (found.__module__, found.__qualname__) == (f"grpo_engage.{module}", name)
    assert found.__doc__ and found.__doc__.strip(), "without a docstring"


def test_all_names_are_listed_once():
    names = [name for names in grpo_engage._NAMES.values() for name in names]
    assert len(names) == len(set(names)) == len(grpo_engage.__all__)
    assert set(grpo_engage.__all__) <= set(dir(grpo_engage))
    assert all(name in grpo_engage.__doc__ for name in names)


def test_rooms_and_modules_are_still_reached():
    assert set(grpo_engage.__all__) & {*ROOMS, "__main__"} == set()
    from grpo_engage import train
    from grpo_engage.train import objective

    assert grpo_engage.train is train and train.objective is objective


@pytest.mark.parametrize(("wrong", "near"), [("Objectiv", "Objective"), ("replytrainer", "ReplyTrainer"),
                                             ("selfbleu", "self_bleu"), ("rouge_L", "rouge_l")])
def test_a_wrong_name_gets_the_nearest_one(wrong, near):
    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; did you mean '{near}'"):
        getattr(grpo_engage, wrong)


def test_a_wrong_name_without_a_neighbour():
    with pytest.raises(AttributeError, match="no attribute 'qqqq'; .*help"):
        grpo_engage.qqqq  # noqa: B018
    with pytest.raises(ImportError, match="qqqq"):
        from grpo_engage import qqqq  # noqa: F401
    assert not hasattr(grpo_engage, "__wrapped__")


def imported_through_the_door(source, package):
    """The names that `source`, a module of `package`, takes from grpo_engage itself, and are no rooms."""
    found, aliases, nodes = [], set(), list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            if [*above, *filter(None, [node.module])] == ["grpo_engage"]:
                found += [alias.name for alias in node.names if alias.name not in ROOMS]
        elif isinstance(node, ast.Import):
            aliases |= {alias.asname or "grpo_engage" for alias in node.names
                        if alias.name == "grpo_engage" or (alias.name.startswith("grpo_engage.") and not alias.asname)}
    return found + [node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                    and node.value.id in aliases and node.attr not in ROOMS]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_inside_the_package_nothing_comes_through_the_door(path):
    package = ["grpo_engage", *path.relative_to(PACKAGE).parent.parts]
    assert imported_through_the_door(path.read_text(encoding="utf-8"), package) == []


def test_no_stage_comes_through_the_door():
    """What a stage depends on is read from its imports; a name of the door does not say which module it is from."""
    sources = ["".join(cell["source"]) for path in (REPO_ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")
               for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
               if {"stage", "parameters"} & {*cell["metadata"].get("tags", ())}]
    assert len(sources) > 10
    assert [source for source in sources if imported_through_the_door(source, ["grpo_engage"])] == []


def test_an_import_through_the_door_would_be_seen():
    for source in ("from grpo_engage import Objective", "from .. import Objective",
                   "def f():\n    from .. import Objective", "import grpo_engage\ngrpo_engage.Objective",
                   "def f():\n    if 1:\n        import grpo_engage as g\nh = g.Objective"):
        assert imported_through_the_door(source, ["grpo_engage", "train"]) == ["Objective"], source
    for source in ("from grpo_engage import train", "from .. import train", "from . import objective",
                   "from grpo_engage.train.objective import Objective", "import grpo_engage.train as t\nt.Objective"):
        assert imported_through_the_door(source, ["grpo_engage", "train"]) == [], source


def test_the_scripts_are_short(readme_scripts):
    assert max(len(script.splitlines()) for script in readme_scripts) <= 20
    assert "ReplyTrainer" in readme_scripts[0] and "GRPOTrainer(" in readme_scripts[1]
    assert "grpo_engage" not in readme_scripts[2]


def test_own_reward_and_own_data(readme_scripts, run_script, tmp_path):
    """The other two scripts need a run: tests/test_run.py."""
    grpo_engage.simulate_pairs(12, seed=3).to_json(tmp_path / "mine.jsonl", orient="records", lines=True)
    checks = """
from grpo_engage import ReplyTrainer
trainer = of["trainer"]
assert type(trainer) is ReplyTrainer and trainer.state.global_step == 3 and of["rejected"].empty
import pandas as pd
pd.DataFrame(trainer.state.log_history).to_csv("log.csv", index=False)
"""
    run_script(readme_scripts[0], tmp_path, checks)
    log = pd.read_csv(tmp_path / "log.csv")[:3]
    assert log[["supervised_loss", "policy_loss", "reward", "diversity"]].notna().all(axis=None)
    assert log["reward"].tolist() == log["rewards/asks_back/mean"].tolist()
    weights = load_file(tmp_path / "mine" / "adapter" / "adapter_model.safetensors")
    assert all(abs(value).max() > 0 for name, value in weights.items() if "lora_B" in name)  # 0 before training


def test_the_map_shows_every_room_and_the_whole_first_page():
    """Its links are followed in tests/test_docs.py."""
    page = (REPO_ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"](../nbs/{room})" not in page] == []
    for path in FIRST_PAGE:
        line = next((line for line in page.splitlines() if re.match(rf"\| .*\b{path.stem}\b", line)), None)
        assert line, f"{path.name} is missing"
        exports = re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
        if exports:
            assert f"`{exports[1].replace('.', '/')}.py`" in line, path.name


def test_make_test_leaves_out_what_is_slow_and_test_all_does_not():
    told = {target: subprocess.run(["make", "--no-print-directory", "-n", target], cwd=REPO_ROOT, capture_output=True,
                                   text=True, check=True).stdout for target in ("test", "everything")}
    assert '-m "not slow"' in told["test"] and "slow" not in told["everything"]
    for tool in ("ruff check", "nbdev_test", "pytest"):
        assert tool in told["test"] and tool in told["everything"]
