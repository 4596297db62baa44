"""The evaluation tasks on the command line.

python -m experiments.tasks list
python -m experiments.tasks show longbench/hotpotqa --length 3500 --data FOLDER
"""

from __future__ import annotations

import argparse
import sys

from crypten_llm.errors import CryptenLLMError, UsageError, exit_code, last_words
from crypten_llm.models.checkpoint import load_tokenizer
from experiments.tasks import TASKS, Example, Text, TextTask, find
from experiments.tools import real_model


def table() -> str:
    """All tasks as a Markdown table."""
    lines = ["| task | source | metric | max new tokens |", "| --- | --- | --- | --- |"]
    for task in TASKS.values():
        tokens = "–" if isinstance(task, TextTask) else task.max_new_tokens
        lines.append(f"| `{task.name}` | {task.source} | {task.metric} | {tokens} |")
    return "\n".join(lines)


def shown(name: str, length: int, index: int, seed: int, model: str, data: str | None, offline: bool) -> str:
    """One example of a task, with its figures. Raises UsageError where there is none."""
    for option, value, least in (("--length", length, 1), ("--index", index, 0)):
        if value < least:
            raise UsageError(f"{option} is {value}; it must be {least} or more")
    task, tokenizer = find(name, data, offline), load_tokenizer(real_model.resolved(model), offline)
    draw = task.texts if isinstance(task, TextTask) else task.examples
    found = draw(tokenizer, length, index + 1, seed)
    if len(found) <= index:
        raise UsageError(f"{name} has {len(found)} examples, so none with --index {index}; count from 0")
    return _described(found[index], task.metric, tokenizer)


def _described(example: Example | Text, metric: str, tokenizer) -> str:
    text = example.text if isinstance(example, Text) else example.prompt
    lines = [
        f"{example.task}, number {example.index}: {len(example.ids(tokenizer)):,} tokens, {metric}",
        "",
        text,
    ]
    if isinstance(example, Example):
        answers = ", ".join(map(repr, example.answers)) or "what the full cache gives"
        lines += ["", f"answers: {answers}; up to {example.max_new_tokens} new tokens"]
        if example.classes:
            lines.append(f"classes: {', '.join(example.classes)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tasks", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="all tasks, as a Markdown table")
    add = commands.add_parser("show", help="one example of a task, as a model gets it").add_argument
    add("name", metavar="TASK")
    add("--length", type=int, default=512, metavar="N", help="prompt tokens at most (default: 512)")
    add("--index", type=int, default=0, metavar="I", help="which example, from 0 (default: 0)")
    add("--seed", type=int, default=0)
    add("--model", default="shipped", help="whose tokenizer: 'shipped', a folder, or a hub id (default: shipped)")
    add("--data", metavar="DATA", help="the evaluation set: a folder, a dataset's hub id, or a text file")
    add("--offline", action="store_true", help="never ask a hub")
    options = vars(parser.parse_args(argv))
    try:
        print(table() if options.pop("command") == "list" else shown(**options))
        return 0
    except (CryptenLLMError, KeyboardInterrupt, ModuleNotFoundError) as error:
        print(f"error: {last_words(error)}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
