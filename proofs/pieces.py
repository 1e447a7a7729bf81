"""Weights in pieces: two processes of FSDP, or of DeepSpeed, given the same completions, against one without.

    python proofs/pieces.py [--ways fsdp deepspeed]     # -> proofs/pieces.csv; deepspeed needs the package

Cases and comparison are those of `processes.py`; the launch is `configs/accelerate/fsdp.yaml` or `deepspeed.yaml`, in
float32 in place of bfloat16. accelerate takes neither for a CPU: it is told here that two CPU processes under gloo are
GPUs (`cpus_as_gpus`), and that is all that is not the real path. What only a GPU can show is speed, memory and NCCL.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import processes
import torch
import yaml
from accelerate.state import DistributedType, PartialState

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.base.environment import own_environment
from grpo_engage.base.processes import launch_command, report_errors

WAYS = ("fsdp", "deepspeed")
CASES = ["reward, K = 4 (a group in two processes)", "supervised", "all three, max_at_3, clipped",
         "all three, KL to the start, LoRA"]


def cpus_as_gpus() -> None:
    """From now on accelerate takes this process's CPU for a GPU, and gloo for what connects it to the others."""
    def prepare(self, *_, **__):
        return "gloo", DistributedType.MULTI_GPU

    def place(self):
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = prepare, place


def in_pieces(way: str, folder: Path, target: list[str]) -> None:
    """Run `target` in two processes by the committed configuration of `way`, in float32. Raises: RuntimeError."""
    config = yaml.safe_load((REPO_ROOT / "configs" / "accelerate" / f"{way}.yaml").read_text(encoding="utf-8"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"mixed_precision": "no"}), encoding="utf-8")
    paths = os.pathsep.join([str(REPO_ROOT), str(Path(__file__).resolve().parent)])
    environment = own_environment(folder / "libraries") | {
        "GRPO_ENGAGE_LAUNCHER": f"{os.uname().nodename}:{os.getpid()}", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/torch_extensions"))}  # DeepSpeed compiles one, once
    done = subprocess.run(launch_command(2, target, folder / "config.yaml"), env=environment, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{way}: ended with exit code {done.returncode}:\n{done.stdout[-2000:]}"
                           f"{done.stderr[-6000:]}")


def compare(way: str, cases: list[str]) -> list[dict]:
    """One row a case: the largest differences between one process and two that hold the weights in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        in_pieces(way, Path(folder), [__file__, "--write", folder, "--cases", *cases])
        return [{"way": way} | processes.compared(Path(folder), place, name) for place, name in enumerate(cases)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS,
                        default=[way for way in WAYS if way == "fsdp" or find_spec(way)])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=list(processes.CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # one of the two processes
    args = parser.parse_args()
    if args.write:
        cpus_as_gpus()
        report_errors(lambda: processes.write(args.write, args.cases), args.write)
        return 0
    rows = [row for way in args.ways for row in compare(way, args.cases)]
    with open(args.out, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return processes.told(rows)


if __name__ == "__main__":
    sys.exit(main())
