"""Several processes: the same numbers as one, and configurations that accelerate reads."""

import importlib.util

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from training import make_trainer

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.base.machines import Meeting
from grpo_engage.base.processes import launch_command, run_processes
from grpo_engage.train.objective import Objective
from grpo_engage.train.settings import TrainSettings

specification = importlib.util.spec_from_file_location("processes", REPO_ROOT / "proofs" / "processes.py")
proof = importlib.util.module_from_spec(specification)
specification.loader.exec_module(proof)


def test_two_processes_compute_what_one_computes():
    """With a group that lies in both; rewards, credit of all three terms, clipping, steps without groups, reward times
    diversity, and a k that goes down."""
    cases = ["supervised", "all three, max_at_3, clipped", "supervised and diversity, groups every 2nd step",
             "reward x diversity", "max_at_k, k from 4 down to 1"]
    for row in proof.compare(cases):
        assert float(row.pop("weights_moved_by")) > 1e-3
        name = row.pop("case")
        assert max(map(float, row.values())) <= proof.TOLERANCE, (name, row)


def test_a_difference_is_seen():
    assert proof.difference({"a": [1.0, "x"]}, {"a": [1.5, "x"]}) == 0.5
    for other in ({"a": [1.0, "y"]}, {"a": [1.0]}, {"b": [1.0, "x"]}):
        assert proof.difference({"a": [1.0, "x"]}, other) == float("inf")


@pytest.mark.parametrize(("name", "kind", "flag"), [
    ("one_gpu", "NO", None), ("fsdp", "FSDP", "use_fsdp"), ("deepspeed", "DEEPSPEED", "use_deepspeed")])
def test_accelerate_reads_the_configurations(name, kind, flag):
    path = REPO_ROOT / "configs" / "accelerate" / f"{name}.yaml"
    assert load_config_from_file(str(path)).distributed_type.value == kind
    # what `accelerate launch` itself makes of it, with the number of processes that the stage gives
    words = launch_command(3, ["script.py"], f"configs/accelerate/{name}.yaml")[3:]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 3 and args.mixed_precision == "bf16" and args.training_script == "script.py"
    kinds = [kind for kind in ("use_fsdp", "use_deepspeed", "multi_gpu") if getattr(args, kind)]
    assert kinds == ([flag] if flag else [])
    if name == "fsdp":
        assert int(args.fsdp_version) == 2 and args.fsdp_state_dict_type == "FULL_STATE_DICT"
    if name == "deepspeed":
        assert int(args.zero_stage) == 2


def test_what_does_not_fit_together_is_refused(base, pairs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="for GPUs"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        run_processes(2, ["script.py"], tmp_path, "training", "configs/accelerate/fsdp.yaml")
    options = dict(objective=Objective(1.0, 0.0, 0.3), max_steps=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match="package vllm"):
        make_trainer(base, pairs, tmp_path, generation_engine="vllm", **options)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("grpo_engage.base.processes.launcher", lambda: "torchrun")
    monkeypatch.setattr("grpo_engage.base.environment.launcher", lambda: "torchrun")  # else the variable is hidden
    with pytest.raises(ValueError, match="n_processes=3 must divide the 8 replies"):
        make_trainer(base, pairs, tmp_path, posts_per_step=2, num_generations=4, **options)


@pytest.mark.slow
def test_two_launchers_that_meet_by_address_compute_what_one_process_computes():
    """As on two machines: each starts its own process, the second joins the first in their folder."""
    for row in proof.compare(["all three, max_at_3, clipped"], machines=2):
        assert float(row.pop("weights_moved_by")) > 1e-3
        name = row.pop("case")
        assert max(map(float, row.values())) <= proof.TOLERANCE, (name, row)


def test_machines_share_the_processes_evenly():
    for n_processes, n_machines in ((3, 2), (1, 2)):
        with pytest.raises(ValueError, match=f"n_machines={n_machines} must divide n_processes={n_processes}"):
            TrainSettings.make(arm="baseline", n_processes=n_processes, n_machines=n_machines)
    words = launch_command(4, ["script.py"], "configs/accelerate/fsdp.yaml", Meeting(2, 1, "10.0.0.1", 29500))[3:]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.num_machines, args.machine_rank, args.main_process_ip) == (2, 1, "10.0.0.1")
    assert (args.main_process_port, args.num_processes, args.use_fsdp) == (29500, 4, True)
