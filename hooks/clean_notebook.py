"""What git stores of a notebook: its source, without outputs, execution counts and the editor's metadata.

    .venv/bin/python hooks/clean_notebook.py --install    # make install, make hooks: the filter for this checkout
    .venv/bin/python hooks/clean_notebook.py nbs          # make clean-notebooks: the files themselves
    … < notebook > cleaned                                # git calls it so when a notebook is added
"""

import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
FILTER = "grpo-engage-notebooks"  # named in .gitattributes
# git runs it in the checkout's folder. Where the environment is gone, the notebook passes as it is.
COMMAND = ("if test -x .venv/bin/python; then .venv/bin/python hooks/clean_notebook.py; else cat; fi")


def cleaned(text: str) -> str:
    """The notebook `text` as nbdev cleans it by settings.ini, and without outputs.

    Raises: ValueError, KeyError or AttributeError for what is no notebook.
    """
    from execnb.nbio import dict2nb, nb2str
    from fastcore.xtras import loads
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    settings = get_config(path=REPO_ROOT)
    notebook = dict2nb(loads(text))
    keys = {name: settings.get(name).split() for name in ("allowed_metadata_keys", "allowed_cell_metadata_keys")}
    clean_nb(notebook, clean_ids=settings.clean_ids, **keys)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = []
    return nb2str(notebook)


def clean_files(folder: Path) -> list[Path]:
    """Cleans the notebooks in `folder`; returns those that changed. Hidden folders are left alone."""
    changed = []
    for path in sorted(folder.rglob("*.ipynb")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        before = path.read_text(encoding="utf-8")
        if (now := cleaned(before)) != before:
            path.write_text(now, encoding="utf-8")
            changed.append(path)
    return changed


def install(checkout: Path) -> str:
    """Sets the filter in the git settings of `checkout` alone; returns what was done, or why nothing was."""
    asked = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True)
    except FileNotFoundError:
        return "no git here: notebooks are not cleaned when they are committed"
    if found.returncode or Path(found.stdout.rstrip("\n")).resolve() != checkout.resolve():
        return "no checkout of git: there is nothing to commit notebooks to"
    subprocess.run(["git", "-C", str(checkout), "config", "--local", f"filter.{FILTER}.clean", COMMAND], check=True)
    return f"git cleans notebooks when they are added (undo: git config --remove-section filter.{FILTER})"


def main(arguments: list[str]) -> int:
    """See the top of this file; returns the exit code."""
    if arguments == ["--install"]:
        print(install(REPO_ROOT))
    elif arguments:
        for path in clean_files(Path(arguments[0])):
            print(f"cleaned {path}")
    else:
        text = sys.stdin.buffer.read().decode("utf-8")
        try:
            sys.stdout.buffer.write(cleaned(text).encode("utf-8"))
        except (ValueError, KeyError, AttributeError) as error:  # git then takes the file as it is, and shows this
            print(f"error: this is no notebook and was not cleaned ({error}): mend it, then add it again",
                  file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
