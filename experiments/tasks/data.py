"""Evaluation sets that lie in files: finding them in a folder or on the hub, and reading their rows.

A task states the places where its rows may lie, as patterns relative to the folder; the first that exists is read, row
by row. A dataset repository on the hub is fetched as files and then is such a folder, so no loading script is ever run
(`datasets` 5 refuses them anyway).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar
from zipfile import BadZipFile, ZipFile

from crypten_llm.errors import UsageError, first_line
from crypten_llm.models.hub import HUB_ID, download
from experiments.tasks.base import Example, truncated

DOCS = "docs/evaluation_data.md says where to get it and in which form"


@dataclass(frozen=True)
class FileTask(ABC):
    """A task whose rows lie in files; `data` is a folder or a hub id, and with `offline` no hub is asked.

    The set is what it is: the first rows are taken, in their order, whatever the seed.
    """

    name: str
    metric: str
    max_new_tokens: int
    data: str | None = None
    offline: bool = False
    source: ClassVar[str]

    def examples(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Example]:
        """The first `count` examples, or all that there are if fewer."""
        folder = self._folder(length)
        rows = list(islice(self._rows(folder, length), count))
        if count and not rows:
            raise UsageError(f"{self.data}: the files there hold no row of {self.name}; {DOCS}")
        return [self._example(folder, row, tokenizer, length, index) for index, row in enumerate(rows)]

    def clean(self, prediction: str) -> str:
        return prediction

    @abstractmethod
    def places(self, length: int) -> tuple[str, ...]:
        """Where the rows may lie, best first: patterns of files, or `ARCHIVE.zip::MEMBER`."""

    @abstractmethod
    def prompt(self, folder: Path, row: dict) -> str:
        """The whole prompt of a row."""

    @abstractmethod
    def answers(self, row: dict) -> Sequence[str]:
        """All answers that count as right."""

    def wanted(self, row: dict) -> bool:
        """Whether a row belongs to this task, where files hold several."""
        return True

    def fitted(self, prompt: str, tokenizer, length: int) -> str:
        """The prompt in at most `length` tokens."""
        return truncated(prompt, tokenizer, length)

    def reading(self, data: str | None, offline: bool) -> FileTask:
        """The task that reads from there."""
        return replace(self, data=data, offline=offline)

    @property
    def key(self) -> str:
        """The task's name within its source."""
        return self.name.partition("/")[2]

    def _folder(self, length: int) -> Path:
        if not self.data:
            raise UsageError(f"{self.name}: no data; give --data FOLDER or a hub id; {DOCS}")
        path = Path(self.data).expanduser()
        if path.is_dir():
            return path
        if path.exists() or not HUB_ID.fullmatch(self.data):
            raise UsageError(f"{self.data!r}: no such folder, and not a hub id (owner/name); {DOCS}")
        return download(
            self.data, self.offline, [place.partition("::")[0] for place in self.places(length)], kind="dataset"
        )

    def _rows(self, folder: Path, length: int) -> Iterator[dict]:
        places = self.places(length)
        for place in places:
            pattern, _, member = place.partition("::")
            if files := sorted(folder.glob(pattern)):
                return (row for row in _read(files, member) if self.wanted(row))
        raise UsageError(f"{self.data}: no rows of {self.name} there, looked for {', '.join(places)}; {DOCS}")

    def _example(self, folder: Path, row: dict, tokenizer, length: int, index: int) -> Example:
        try:
            prompt, answers = self.prompt(folder, row), self.answers(row)
        except KeyError as error:
            raise UsageError(
                f"{self.data}: row {index} of {self.name} has no field {error}, only {', '.join(row)}; {DOCS}"
            ) from None
        if isinstance(answers, str) or not answers:
            raise UsageError(
                f"{self.data}: the answers of row {index} of {self.name} are {answers!r}, not a list; {DOCS}"
            )
        classes = tuple(row.get("all_classes") or ())
        prompt = self.fitted(prompt, tokenizer, length)
        return Example(self.name, prompt, tuple(answers), self.max_new_tokens, classes, index)


def _read(files: Sequence[Path], member: str) -> Iterator[dict]:
    """The rows of files of one kind, .jsonl or .parquet, or of one .jsonl `member` of an archive."""
    try:
        for file in files:
            if member:
                with ZipFile(file) as archive, archive.open(member) as lines:
                    yield from _rows_of(lines)
            elif file.suffix == ".parquet":
                import datasets  # takes seconds to import

                yield from datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            else:
                with file.open("rb") as lines:
                    yield from _rows_of(lines)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        place = f"{file}, {member}" if member else file
        raise UsageError(f"{place}: cannot be read as rows ({first_line(error)}); download it again") from error


def _rows_of(lines: Iterable[bytes]) -> Iterator[dict]:
    """JSON objects, one a line. The JSON reader of `datasets` would turn answers that are dates into timestamps."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row
