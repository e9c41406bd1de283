"""The notebook runs from its first cell to its last in a kernel, as a reader's does, and is clean in the repository."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "quickstart.ipynb"


def outputs_of(notebook: Any, cell: str) -> list[Any]:
    (found,) = (each for each in notebook.cells if each.id == cell)
    return list(found.outputs)


def text_of(notebook: Any, cell: str) -> str:
    return "\n".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in outputs_of(notebook, cell)
    )


def test_the_notebook_is_clean_where_it_is_kept() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert not any(place in text for place in ("/home/", "/Users/", "/tmp/", "/root/", ".venv"))
    assert json.loads(text)["metadata"].keys() == {"kernelspec", "language_info"}


@pytest.mark.long
def test_a_reader_sees_plan_rounds_plots_reports_and_text(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # In a kernel, and not by `exec`: only there does the display meet a notebook instead of a terminal.
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert "train/central" in text_of(notebook, "plan")
    shown = text_of(notebook, "run")
    assert "central loss" in shown
    assert "report.html" in shown
    assert "--- with the adapter ---" in text_of(notebook, "text")
    for cell in ("losses", "mu"):
        assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook, cell))
    for cell in ("report", "compare"):
        assert "iframe" in outputs_of(notebook, cell)[-1].data["text/html"]
    warned = [
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"
    ]
    assert warned == []
