"""What goes wrong with a machine: killed, the disk full, a folder that may not be written, a checkpoint damaged."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from training import train_arm
from transformers import TrainerCallback

from grpo_engage.base.core import REPO_ROOT, file_sha256, write_json
from grpo_engage.base.storage import check_writable
from grpo_engage.run import execution, runner
from grpo_engage.run.cli import main
from grpo_engage.train.objective import Objective

OPTIONS = dict(objective=Objective(1.0, 0.0, 0.3), max_steps=5, learning_rate=1e-3, posts_per_step=2, num_generations=2,
               max_new_tokens=6, lora_r=4, save_steps=2)
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_survival import OPTIONS
from training import train_arm
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.data.simulator import simulate_pairs
train_arm(ensure_policy("nano"), simulate_pairs(30, seed=8)[["tweet", "reply"]], Path(sys.argv[2]), **OPTIONS)
"""


class At(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class AtTheEnd(TrainerCallback):
    """After the last step and its checkpoint, before the adapter is saved."""

    def on_train_end(self, *_, **__):
        raise Killed


class Count(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_begin(self, *_, **__):
        self.steps += 1


class Killed(Exception):
    pass


def die():
    raise Killed


@pytest.fixture(scope="module")
def whole(base, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_arm(base, pairs, folder, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def cut(base, pairs, tmp_path_factory):
    """A run that died after step 5, before its end: checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(Killed):
        train_arm(base, pairs, folder, **OPTIONS, callbacks=[At(5, die)])
    assert sorted(path.name for path in (folder / "checkpoints").glob("*-*")) == ["checkpoint-2", "checkpoint-4"]
    return folder


def goes_on(base, pairs, folder, whole, capsys, step):
    log = train_arm(base, pairs, folder, **OPTIONS)
    said = capsys.readouterr().out
    assert f"goes on after step {step}" in said
    assert log["step"].tolist() == [1, 2, 3, 4, 5]
    assert file_sha256(folder) == file_sha256(whole)  # adapter, its config, the log, and nothing else
    return said


def test_kill_9_while_polychromic_trains(base, pairs, whole, tmp_path, capsys):
    words = [sys.executable, "-c", SCRIPT, str(REPO_ROOT / "tests"), str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 900
        while not (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "run" / "adapter").exists()
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").glob("*-*")
               if (path / "trainer_state.json").exists())
    goes_on(base, pairs, tmp_path / "run", whole, capsys, last)


@pytest.fixture(scope="module", params=[Objective(1.0, 0.0, 0.0), Objective(0.0, 1.0, 0.0)])
def epochs(request, base, pairs, tmp_path_factory):
    """Eight steps of a whole run, three an epoch, by one objective: its folder, its posts and its options."""
    options = OPTIONS | dict(objective=request.param, max_steps=8, save_steps=2, batch_size=4,
                             reward=lambda posts, replies: [float(len(reply)) for reply in replies])
    few = pairs.drop_duplicates("tweet").head(12 if request.param.alpha else 6)
    folder = tmp_path_factory.mktemp("epochs")
    train_arm(base, few, folder, **options)
    return folder, few, options


@pytest.mark.parametrize(("death", "last"), [(5, 4), (7, 6)])
def test_a_resume_in_a_later_epoch_sees_the_same_posts(base, epochs, tmp_path, death, last):
    """Checkpoint 4 lies within the second epoch, 6 ends it."""
    uncut, few, options = epochs
    with pytest.raises(Killed):
        train_arm(base, few, tmp_path / "cut", **options, callbacks=[At(death, die)])
    assert last == max(int(path.name.split("-")[1]) for path in (tmp_path / "cut" / "checkpoints").glob("*-*"))
    train_arm(base, few, tmp_path / "cut", **options)
    assert file_sha256(tmp_path / "cut") == file_sha256(uncut)


@pytest.mark.parametrize("max_steps", [5, 6])
@pytest.mark.parametrize("objective", [Objective(1.0, 0.0, 0.0), Objective(0.0, 1.0, 0.0)])
def test_a_kill_after_the_last_step_trains_nothing_again(base, pairs, tmp_path, objective, max_steps, capsys):
    """Three steps are an epoch: step 5 lies within the second, 6 ends it."""
    options = OPTIONS | dict(objective=objective, max_steps=max_steps, batch_size=4,
                             reward=lambda posts, replies: [float(len(reply)) for reply in replies])
    few = pairs.drop_duplicates("tweet").head(12 if objective.alpha else 6)
    train_arm(base, few, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        train_arm(base, few, tmp_path / "cut", **options, callbacks=[AtTheEnd()])
    log = train_arm(base, few, tmp_path / "cut", **options, callbacks=[count := Count()])
    assert f"goes on after step {max_steps}" in capsys.readouterr().out
    assert count.steps == 0 and log["step"].tolist() == list(range(1, max_steps + 1))
    assert file_sha256(tmp_path / "cut") == file_sha256(tmp_path / "whole")


def test_the_checkpoints_of_a_job_go_when_it_is_over_and_not_before(tmp_path, monkeypatch):
    folder = tmp_path / "train" / "grpo" / "seed0"
    write_json(tmp_path / "config.json",
               {"arms": ["grpo"], "seeds": [0], "preset": "smoke",
                "stages": {"train": {"grpo": {"max_steps": 3, "reward": "learned"}}}})

    def execute(notebook, executed, parameters, label):
        assert parameters["keep_checkpoints"] and parameters["max_steps"] == 3
        (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        if fails:
            raise execution.NotebookFailure("no")
        (folder / "adapter").mkdir()
        for name in ("train_log.csv", "verdict.json", "manifest.json"):
            write_json(folder / name, {"status": "completed", "parameters": {}})

    monkeypatch.setattr(execution, "execute_notebook", execute)
    fails = True
    with pytest.raises(execution.NotebookFailure):
        runner.run_stage(tmp_path, "train", "grpo", 0)
    assert (folder / "checkpoints" / "checkpoint-3").exists()
    fails = False
    runner.run_stage(tmp_path, "train", "grpo", 0)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(base, pairs, cut, whole, tmp_path, capsys, name):
    shutil.copytree(cut, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "checkpoint-4" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    said = goes_on(base, pairs, tmp_path / "run", whole, capsys, 2)
    assert "checkpoint-4" in said and "the one before is taken" in said


def test_a_full_disk_while_a_checkpoint_is_written(base, pairs, whole, tmp_path, capsys):
    """A limit on the size of files stands in for the disk: the same writers fail in the same places."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tight = At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1])))
    try:
        with pytest.raises(OSError) as caught:
            train_arm(base, pairs, tmp_path, **OPTIONS, callbacks=[tight])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert str(tmp_path) in message and "give the same command again" in message, message
    goes_on(base, pairs, tmp_path, whole, capsys, 2)


def test_a_full_disk_is_named(base, pairs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.trainer.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="the disk is full: free some space there") as caught:
        train_arm(base, pairs, tmp_path, **OPTIONS)
    assert caught.value.errno == errno.ENOSPC and str(tmp_path) in str(caught.value)


def test_a_disk_too_full_for_the_executed_notebook_is_named(tmp_path, monkeypatch):
    """papermill and the manifest meet it as well as training; with a real full file system: docs/log.md."""
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "config.json",
               {"stages": {"data": {"source": "simulator"}}, "arms": [], "seeds": [], "preset": "smoke"})
    monkeypatch.setattr(execution, "execute_notebook", full)
    with pytest.raises(OSError, match="the disk is full: free some space there") as caught:
        runner.run_stage(tmp_path, "data")
    assert str(tmp_path / "data") in str(caught.value)


def test_an_unwritable_folder_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRPO_ENGAGE_RUNS", str(tmp_path / "file"))
    assert main(["run", "data", "--preset", "smoke"]) == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and str(tmp_path / "file" / "smoke") in message
    assert "a part of its path is a file" in message and "name another folder" in message


def test_a_folder_of_somebody_else(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # root, who may run this, is never refused

    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(PermissionError, match="this user may not write there: correct its owner or mode") as caught:
        check_writable(tmp_path)
    assert str(tmp_path) in str(caught.value)
