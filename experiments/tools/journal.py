"""A file of results that survives being killed: JSON lines, each run's configuration and origin among them.

Owns the file. A run that is started again goes on after the last whole line; one with a configuration under which the
rows there are would have come out otherwise is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from crypten_llm.errors import UsageError
from experiments.tools.provenance import provenance

RUN = "run"


def cut_torn_line(path: Path) -> None:
    """Takes away what follows the last line's end: the line that was being written when the writer was killed."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read(path: Path) -> list[dict]:
    """The rows of a file, runs among them. Raises UsageError for a file of another kind."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if rows and rows[0]["kind"] == RUN and all("kind" in row for row in rows) or not rows:
            return rows
    except (ValueError, TypeError, KeyError):
        pass
    raise UsageError(f"{path} is no file of results of this command; give another name (--out)")


class Journal:
    """The rows of ``path``, each a dictionary with a ``kind``; ``append`` writes one more before it returns.

    free: settings that may differ from run to run, since they say which rows there are and not what is in them.
    ``runs``: the configuration, revision, versions and machine of each run that added to the file; a run that adds
    nothing leaves no trace.

    Raises UsageError where the file was made with another configuration, or is of another kind.
    """

    def __init__(self, path: Path, config: dict, free: Sequence[str] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self.path, found = path, read(path) if path.exists() else []
        self.runs = [row for row in found if row["kind"] == RUN]
        self.rows = [row for row in found if row["kind"] != RUN]
        if self.runs:
            self._check(self.runs[0]["config"], config, free)
        self._this = {"kind": RUN, "config": config, **provenance("crypten", "transformers", "numpy")}

    def append(self, row: dict) -> None:
        if self._this not in self.runs:
            self.runs.append(self._this)
            self._write(self._this)
        self.rows.append(row)
        self._write(row)

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]

    def _check(self, before: dict, config: dict, free: Sequence[str]) -> None:
        for name in {**before, **config}.keys() - set(free):
            old, new = before.get(name), config.get(name)
            if old != new:
                raise UsageError(
                    f"{self.path} was made with {name} = {json.dumps(old)}, and this run has {json.dumps(new)}; give "
                    "another name (--out), or remove the file to start again"
                )

    def _write(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
