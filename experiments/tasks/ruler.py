"""RULER (arXiv 2404.06654): 13 synthetic tasks, written here (`synthetic`) or as its scripts write them into files.

Both are for a tokenizer and a length. Without data, or with a text of one's own, prompts are written here. Of files, a
row is `input` and `outputs`, with `answer_prefix` apart in newer versions; a mirror may split the prompt into
`context`, `question` and `answer_prefix`, with `answer` and `task`. Prompts are never cut: what they ask for might be
lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import has_chat_template
from experiments.tasks import synthetic
from experiments.tasks.base import Example
from experiments.tasks.data import FileTask
from experiments.tasks.natural import is_text


@dataclass(frozen=True)
class Ruler(FileTask):
    """One task of RULER."""

    source: ClassVar[str] = "ruler"

    def examples(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Example]:
        """From files the first `count`, whatever the seed; written here, those of the seed."""
        if self.data is not None and not is_text(self.data):
            return super().examples(tokenizer, length, count, seed)
        rendered = has_chat_template(tokenizer)
        written = synthetic.prompts(self.key, tokenizer, length, count, seed, self.data)
        return [
            Example(self.name, prompt, draft.answers, self.max_new_tokens, index=i, rendered=rendered)
            for i, (draft, prompt) in enumerate(written)
        ]

    def clean(self, prediction: str) -> str:
        return re.sub(r"[\x00-\x1f]", "\n", prediction).strip()

    def places(self, length: int) -> tuple[str, ...]:
        rows = f"{self.key}/validation.jsonl"
        return f"{length}/data/{rows}", f"{length}/{rows}", rows, f"{length}/test-*.parquet"

    def wanted(self, row: dict) -> bool:
        return row.get("task", self.key) == self.key

    def prompt(self, folder: Path, row: dict) -> str:
        text = row["input"] if "input" in row else row["context"] + row["question"]
        return text + row.get("answer_prefix", "")

    def answers(self, row: dict) -> Sequence[str]:
        return row["outputs"] if "outputs" in row else row["answer"]

    def fitted(self, prompt: str, tokenizer, length: int) -> str:
        tokens = len(tokenizer(prompt)["input_ids"])
        if tokens > length:
            raise UsageError(
                f"{self.data}: a prompt of {self.name} has {tokens:,} tokens, more than {length:,}, and a cut might "
                "take its answer; write RULER for this tokenizer and length, or ask for a larger one"
            )
        return prompt


def _task(key: str, max_new_tokens: int, metric: str = "string_match_all") -> Ruler:
    return Ruler(f"ruler/{key}", metric, max_new_tokens)


TASKS = (
    *(_task(f"niah_single_{i}", 128) for i in (1, 2, 3)),
    *(_task(f"niah_multikey_{i}", 128) for i in (1, 2, 3)),
    _task("niah_multivalue", 128),
    _task("niah_multiquery", 128),
    _task("vt", 30),
    _task("cwe", 120),
    _task("fwe", 50),
    _task("qa_1", 32, "string_match_part"),
    _task("qa_2", 32, "string_match_part"),
)
