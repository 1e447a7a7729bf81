"""What is private in a library may change with any version: each such name that we use stands here with its version."""

import ast
import importlib
import inspect
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import PretrainedConfig, Trainer
from transformers.integrations import TensorBoardCallback
from trl import GRPOTrainer

from grpo_engage.base.core import REPO_ROOT

# Library -> the version whose source was read, and the private names that we override, call or read, with the object
# that has them. A module that has them is given by its name.
READ = {
    "trl": ("1.16.0", {GRPOTrainer: (
        "_calculate_rewards", "_compute_loss", "_generate", "_generate_and_score_completions", "_generate_single_turn",
        "_get_per_token_logps_and_entropies", "_get_train_sampler", "_prepare_inputs", "_tokenize_prompts",
        "_set_signature_columns_if_needed", "_entropy_bonus_enabled", "_logs", "_metrics", "_name", "_paper",
        "_signature_columns", "_tag_names", "_tokenizer")}),
    "transformers": ("5.23.0", {
        Trainer: ("_get_dataloader", "_run_epoch", "_save_checkpoint", "_train_batch_size"),
        TensorBoardCallback: ("_SummaryWriter",), PretrainedConfig: ("_attn_implementation", "_name_or_path")}),
    "torch": ("2.13.0", {"torch": ("_foreach_norm",)}),
}
# Python's own, which it calls at the end of a process; its versions are those of CI.
PYTHON = {"threading": "_shutdown", "atexit": "_run_exitfuncs"}
PUBLIC = {"_asdict", "_replace", "_fields", "_exit"}  # named tuples' and os._exit: documented
NAMES = {name for _, owners in READ.values() for names in owners.values() for name in names}


def own_attribute(owner, name):
    """Whether the class or module `owner` has `name`, or the classes it is made from set it on their instances."""
    if isinstance(owner, str):
        return hasattr(importlib.import_module(owner), name)
    places = [inspect.getsource(part) for part in owner.__mro__ if part.__module__.split(".")[0] in READ]
    return hasattr(owner, name) or any(re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", text) for text in places)


@pytest.mark.parametrize("library", READ)
def test_the_version_is_the_one_that_was_read(library):
    read, owners = READ[library]
    names = ", ".join(name for part in owners.values() for name in part)
    assert version(library).partition("+")[0] == read, (
        f"{library} is {version(library)}, and its private {names} were read in {read}: read them again in the new "
        "source, then set the version here, in settings.ini and in requirements.lock")


@pytest.mark.parametrize("library", READ)
def test_the_names_are_there(library):
    read, owners = READ[library]
    gone = [f"{owner if isinstance(owner, str) else owner.__name__}.{name}" for owner, names in owners.items()
            for name in names if not own_attribute(owner, name)]
    assert gone == [], f"{library} {version(library)} has no {', '.join(gone)} any more; they were read in {read}"


def test_python_has_its_own_still():
    assert all(own_attribute(module, name) for module, name in PYTHON.items())


@pytest.mark.parametrize("library", READ)
def test_settings_and_lock_pin_that_version(library):
    pin = re.compile(rf"(?m)(?:^|\s){library}=={re.escape(READ[library][0])}(?=\s|$)")
    for name in ("settings.ini", "requirements.lock"):
        assert pin.search((REPO_ROOT / name).read_text(encoding="utf-8")), f"{name} pins another {library}"


def test_a_name_that_is_gone_would_be_seen():
    assert not own_attribute(GRPOTrainer, "_no_such_method") and not own_attribute("torch", "_no_such_function")
    assert own_attribute(GRPOTrainer, "_entropy_bonus_enabled") and not hasattr(GRPOTrainer, "_entropy_bonus_enabled")


def sources():
    """The code of every cell of every notebook, by notebook."""
    for path in sorted((REPO_ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")):
        if not any(part.startswith(".") for part in path.relative_to(REPO_ROOT).parts):
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                text = "".join(cell["source"])
                if cell["cell_type"] == "code" and not text.startswith(("%", "!")):
                    yield path.name, text


def private_names(texts):
    """(used, defined): names with one leading underscore that code takes of an object, and those that it defines."""
    used, defined = {}, set()
    for place, text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, place)
            elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1
                  and node.func.id in ("getattr", "setattr", "hasattr") and isinstance(node.args[1], ast.Constant)):
                used.setdefault(node.args[1].value, place)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("grpo_engage"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                used |= {name: place for name in names if not (node.module == "__future__")}
    private = {name: place for name, place in used.items() if re.match(r"_[A-Za-z]", name)}
    return private, defined


def test_every_private_name_of_a_library_stands_here():
    used, defined = private_names(sources())
    known = {*NAMES, *PUBLIC, *PYTHON.values()}
    unknown = {name: place for name, place in used.items() if name not in known and name not in defined}
    assert unknown == {}, "private names of a library: add them to READ with the version that they were read in"


def overridden():
    """Private names that a class of ours defines and that a base of it in another library has, as (class, name)."""
    for path in sorted((REPO_ROOT / "grpo_engage").rglob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"(?m)^class \w+\(", text):
            continue
        name = ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts)
        for kind in vars(importlib.import_module(name)).values():
            if inspect.isclass(kind) and kind.__module__ == name:
                foreign = [base for base in kind.__mro__
                           if base.__module__.split(".")[0] in (*READ, "peft", "accelerate", "jupyter_client")]
                own = {key for key, value in vars(kind).items() if re.match(r"_[A-Za-z]", key)
                       and getattr(value, "__module__", "") == name}  # not what a metaclass adds
                yield from ((kind.__name__, key) for key in own if any(key in vars(base) for base in foreign))


def test_every_private_method_that_is_overridden_stands_here():
    found = set(overridden())
    assert ("SafeGRPOTrainer", "_compute_loss") in found
    assert {pair for pair in found if pair[1] not in NAMES} == set()


def test_a_new_private_name_would_be_seen():
    for text in ("trainer._new_thing()", "getattr(model, '_new_thing', None)", "from trl._new_thing import x",
                 "from trl.core import _new_thing"):
        assert "_new_thing" in private_names([("x", text)])[0], text
    assert Path(private_names([("x.ipynb", "a._b")])[0]["_b"]).suffix == ".ipynb"
