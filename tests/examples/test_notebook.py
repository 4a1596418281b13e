"""The example notebook runs from its first cell to its last and shows what it promises; it is kept without outputs."""

import base64
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[2] / "examples" / "panel_in_a_notebook.ipynb"
PNG = b"\x89PNG\r\n\x1a\n"


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells in a kernel of this very interpreter, in a folder of its own."""
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.create_kernel_manager()
    assert client.km is not None
    client.km.kernel_spec.argv[0] = sys.executable
    return client.execute()


def shown(notebook: Any, kind: str) -> list[str]:
    """What cells displayed as one MIME type, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [str(output["data"][kind]) for output in outputs if kind in output.get("data", {})]


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count is not None] == []
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 60


def test_it_ends_with_the_run_and_the_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = execute(nbformat.read(NOTEBOOK, as_version=4), tmp_path)  # type: ignore[no-untyped-call]
    prices, run = shown(notebook, "text/html")
    assert "<table>" in prices
    assert "curvature/sharpness" in prices
    assert "<table>" in run
    assert "digits: hit at step" in run
    assert '<td style="text-align:left">curvature/preconditioned_sharpness</td>' in run
    (picture,) = shown(notebook, "image/png")
    assert base64.b64decode(picture).startswith(PNG)
    assert notebook.cells[-1].outputs[-1].data["image/png"] == picture
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert errors == []


def test_a_cell_that_fails_is_seen(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])  # type: ignore[no-untyped-call]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(broken, tmp_path)
