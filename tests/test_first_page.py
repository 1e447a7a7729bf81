"""The first page's notebooks show their result near their top, once they have run."""

import json

import nbclient
import nbformat
import pytest

from grpo_engage.base.core import REPO_ROOT

FIRST_PAGE = sorted((REPO_ROOT / "nbs").glob("0*.ipynb"))
PLACE_WITHIN = 5  # cells: two screens of JupyterLab at most


def sources_of(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def test_there_are_ten():
    assert [path.name[:2] for path in FIRST_PAGE] == [f"{number:02}" for number in range(10)]


@pytest.mark.parametrize("path", FIRST_PAGE, ids=lambda path: path.stem)
def test_a_place_for_the_result_is_kept_at_the_top_and_filled_once(path):
    sources = sources_of(path)
    places = [place for place, source in enumerate(sources) if "result = ResultSlot(" in source]
    assert len(places) == 1 and places[0] < PLACE_WITHIN
    assert sum("\nresult.show(" in f"\n{source}" for source in sources[places[0] + 1 :]) == 1


def test_a_headless_run_changes_what_stands_at_the_top():
    """nbclient, which papermill runs by: the last cell changes the first one's output; of the note nothing is left."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(source)
            for source in (
                "from grpo_engage.base.result_slot import ResultSlot\nresult = ResultSlot('What came out')",
                "value = 6 * 7",
                "result.show(f'{value} < 43')",
            )
        ]
    )
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    first, _, last = notebook.cells
    shown = first.outputs[0]["data"]["text/html"]
    assert "What came out" in shown and "42 &lt; 43" in shown and "appears here" not in shown and last.outputs == []


@pytest.mark.slow
@pytest.mark.parametrize("path", FIRST_PAGE, ids=lambda path: path.stem)
def test_run_all_puts_a_picture_or_ten_replies_at_the_top(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=1800, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = "".join(
        output.get("data", {}).get("text/html", "")
        for cell in notebook.cells[:PLACE_WITHIN]
        for output in cell.get("outputs", [])
    )
    assert "data:image/png;base64," in shown and "appears here" not in shown
