"""Packaging: everything is read from settings.ini, the one place where nbdev and setuptools meet."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

_parser = ConfigParser(delimiters=["="], interpolation=None)
_parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = _parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["grpo_engage", "grpo_engage.*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split(), "slurm": settings["slurm_requirements"].split()},
    entry_points={"console_scripts": ["grpo_engage=grpo_engage.run.cli:main"]},
)
