"""Every notebook runs from top to bottom in a Jupyter kernel, in its own folder, shows its plots and ends with True."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from programs import ended

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("notebook", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_notebook_runs(notebook, tmp_path):
    book = nbformat.read(FOLDER / notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "notebooks are kept without outputs"
    # As Jupyter starts it: the notebook alone knows where the package is.
    environment = {**os.environ, "PYTHONPATH": "", "IPYTHONDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    with client.setup_kernel(env=environment):
        kernel = client.km.provisioner.pid
        for index, cell in enumerate(book.cells):
            client.execute_cell(cell, index)
    ended(kernel)
    drawing = [cell for cell in book.cells if "plt.show()" in cell.source or "display(" in cell.source]
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in drawing)
    *claims, last = book.cells[-1].outputs[-1].text.splitlines()
    assert last == "True", "\n".join(claims)
