"""Every notebook runs from top to bottom in a Jupyter kernel, in its own folder, shows its plots and ends with True.

They run beside each other, two at a time, from when the first is asked for: much of each is waiting.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from programs import ended

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


async def run(notebook, place):
    """The notebook with its outputs; every process that it started has ended."""
    book = nbformat.read(FOLDER / notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "notebooks are kept without outputs"
    # As Jupyter starts it: the notebook alone knows where the package is.
    environment = {**os.environ, "PYTHONPATH": "", "IPYTHONDIR": str(place), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    async with client.async_setup_kernel(env=environment):
        kernel = client.km.provisioner.pid
        for index, cell in enumerate(book.cells):
            await client.async_execute_cell(cell, index)
    ended(kernel)
    return book


@pytest.fixture(scope="module")
def running(request, tmp_path_factory):
    """By name, each notebook that was asked for, under way or done."""
    asked = [item.callspec.params["notebook"] for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(2) as workers:
        yield {name: workers.submit(asyncio.run, run(name, tmp_path_factory.mktemp("notebook"))) for name in asked}


@pytest.mark.parametrize("notebook", NAMES)
def test_notebook_runs(notebook, running):
    book = running[notebook].result()
    drawing = [cell for cell in book.cells if "plt.show()" in cell.source or "display(" in cell.source]
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in drawing)
    assert book.cells[-1].outputs[-1].text.rstrip().endswith("True")
