"""Results in one JSON file, written whole with each new figure, from which a run that was interrupted goes on.

Owns the file: a kill at any moment leaves the old one or the new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def load(path: Path | None) -> dict:
    """What was kept at ``path``; nothing where there is no file yet, or none is wanted."""
    return json.loads(path.read_text("utf-8")) if path and path.exists() else {}


def save(path: Path | None, result: dict) -> None:
    """Keeps ``result`` at ``path``, where one is wanted."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
