"""The wheels that a GPU machine lacks which has torch, transformers, accelerate and peft and reaches no registry.

    python benchmarks/gpu_wheels.py pack outputs/gpu-wheels [--python 3.12] [--more bitsandbytes]     # here
    python benchmarks/gpu_wheels.py unpack outputs/gpu-wheels outputs/gpu-packages                    # there
    PYTHONPATH=.:outputs/gpu-packages python benchmarks/gpu_check.py outputs/gpu-check                # there

`pack` downloads the versions of requirements.lock for that Python (Linux, x86-64) into part1, part2 … of less than 60
MiB each, so that they can be carried one at a time; `unpack` needs all parts, no network, and Python's own pip.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60 * 2**20  # of the 64 MiB that may be carried at once, room for the checkout
# What gpu_check loads beyond the four and what they bring (tests/test_gpu_paths.py compares this with what it loads).
NEEDED = ("certifi", "charset-normalizer", "cloudpickle", "contourpy", "cycler", "datasets", "dill", "fonttools",
          "joblib", "kiwisolver", "matplotlib", "multiprocess", "narwhals", "pandas", "pillow", "pyarrow", "pyparsing",
          "python-dateutil", "requests", "scikit-learn", "scipy", "six", "threadpoolctl", "trl", "urllib3", "xxhash")
# pip takes each by its name, and none for a lower one
PLATFORMS = ("any", "manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)))


def locked(names: tuple[str, ...] = NEEDED) -> list[str]:
    """`names` with their versions of requirements.lock. Raises: KeyError for one that is not locked."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    versions = {line.partition("==")[0].lower().replace("_", "-"): line.split()[0] for line in lines if "==" in line}
    return [versions[name] for name in names]


def parts(sizes: dict[str, int], limit: int = LIMIT) -> list[list[str]]:
    """Names in groups of less than `limit` bytes, the largest first. Raises: ValueError for one that is too large."""
    groups: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] >= limit:
            raise ValueError(f"{name} has {sizes[name] / 2**20:.0f} MiB alone, more than a part may have: it must come "
                             "to the other machine in another way")
        for group in groups:
            if sum(sizes[other] for other in group) + sizes[name] < limit:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def pack(folder: Path, python: str, more: list[str]) -> None:
    """Download the wheels into parts of `folder`, which is made anew."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                        "--python-version", python, *(f"--platform={name}" for name in PLATFORMS), "--dest", scratch,
                        *locked(), *more], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        sizes = {path.name: path.stat().st_size for path in Path(scratch).iterdir()}
        for place, names in enumerate(parts(sizes), 1):
            part = folder / f"part{place}"
            part.mkdir(parents=True)
            for name in names:
                shutil.move(Path(scratch) / name, part / name)
            print(f"{part}: {len(names)} wheels, {sum(sizes[name] for name in names) / 2**20:.1f} MiB")


def unpack(folder: Path, target: Path) -> None:
    """Install the wheels of all parts into `target`, by pip alone. Raises: FileNotFoundError where there is none."""
    wheels = sorted(map(str, folder.glob("part*/*.whl")))
    if not wheels:
        raise FileNotFoundError(f"there are no wheels in {folder}/part*: carry what `pack` left there")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
                    "--target", str(target), *wheels], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser("pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python", default="3.11", help="that machine's")
    packing.add_argument("--more", nargs="*", default=[], help="further packages, as pip takes them")
    unpacking = actions.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.action == "pack":
        pack(given.folder, given.python, given.more)
    else:
        unpack(given.folder, given.target)


if __name__ == "__main__":
    main()
