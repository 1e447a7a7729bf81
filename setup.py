"""Packaging: everything is read from settings.ini, the one place where nbdev and setuptools meet."""

import json
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
# What a run needs beside the modules. A wheel carries copies in grpo_engage/_data; base/08_places finds them there.
DATA = ("nbs/**/*.ipynb", "configs/**/*.yaml", "paper/main.tex", "paper/references.bib", "Snakefile",
        "benchmarks/tuning.csv")
EXTRA = "_requirements"  # settings.ini's paper_requirements is the extra `paper`


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()


def commit() -> dict:
    """What the manifests of an installed package say of its code: the commit that the wheel is built from."""
    version = {"version": settings["version"]}
    try:
        if Path(git("rev-parse", "--show-toplevel")) == HERE:
            return version | {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        pass  # no git here; as below
    return version | {"commit": None, "dirty": None, "reason": "the wheel was built outside of a git repository"}


class BuildWithData(build_py):
    """Copies DATA into what is built; an editable installation uses the checkout itself."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "grpo_engage" / "_data"
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may have had other files
        for pattern in DATA:
            for path in sorted(HERE.glob(pattern)):
                name = path.relative_to(HERE)
                if not any(part.startswith(".") for part in name.parts):  # what JupyterLab keeps
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target / name)
        (target / "build.json").write_text(json.dumps(commit(), indent=2) + "\n", encoding="utf-8")


_parser = ConfigParser(delimiters=["="], interpolation=None)
_parser.read(HERE / "settings.ini", encoding="utf-8")
settings = _parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["grpo_engage", "grpo_engage.*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={name.removesuffix(EXTRA): settings[name].split() for name in settings if name.endswith(EXTRA)},
    entry_points={"console_scripts": ["grpo_engage=grpo_engage.__main__:start"]},
    cmdclass={"build_py": BuildWithData},
)
