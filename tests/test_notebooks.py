"""The notebooks run from top to bottom in an empty folder, and are committed small and clean."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("01_targets.ipynb", "02_your_own_target.ipynb")
# What replaces a notebook's cell tagged "parameters", to keep the test short.
SMALL = {"02_your_own_target.ipynb": "EPOCHS, NUM_PROBLEMS, NUM_SAMPLES = 1, 12, 4"}


def _read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = _read(name)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = SMALL[name]
    work = tmp_path / "work"
    work.mkdir()
    # No installed kernel is looked at, which leaves ipykernel's own: this very Python.
    specs = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs),
        timeout=300,
        resources={"metadata": {"path": str(work)}},
    )
    client.execute()  # raises CellExecutionError
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    closing = cells[-1].outputs[-1].data["text/markdown"]
    assert "nan" not in re.findall(r"\w+", closing)
    assert not list(work.iterdir()), "something was left beside the notebook"


@pytest.mark.parametrize("name", NAMES)
def test_is_committed_clean(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    notebook = _read(name)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(set(output.data) <= {"image/png", "text/plain"} for output in outputs)
    assert len(outputs) <= 2
    assert len(text) < 200_000
    assert not any(cell.execution_count for cell in cells)
    sources = json.dumps([cell.source for cell in notebook.cells])
    assert not re.search(r"/(home|root|tmp|work|Users|usr|mnt|opt)/|[A-Z]:\\\\", sources)
    assert notebook.cells[0].cell_type == "markdown"
    assert "seen" in notebook.cells[-2].source  # each ends with what was seen
