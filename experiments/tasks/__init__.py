"""Evaluation tasks by name: the shipped model's own, and the field's."""

from __future__ import annotations

from difflib import get_close_matches

from crypten_llm.errors import UsageError
from experiments.tasks import longbench, prose, ruler, shipped, xsum
from experiments.tasks.base import Example, Task, Text, TextTask, score

TASKS: dict[str, Task | TextTask] = {
    task.name: task for task in (*shipped.TASKS, *longbench.TASKS, *ruler.TASKS, *xsum.TASKS, *prose.TASKS)
}


def find(name: str, data: str | None = None, offline: bool = False) -> Task | TextTask:
    """The task called `name`, reading from `data`: a folder or a hub id with its rows, or a text to hide things in.

    Raises UsageError with the near names for an unknown one, and where a task takes no data.
    """
    if name not in TASKS:
        near = ", ".join(get_close_matches(name, TASKS, n=3)) or ", ".join(TASKS)
        raise UsageError(
            f"unknown task {name!r}; the nearest: {near}; `python -m experiments.tasks list` shows all {len(TASKS)}"
        )
    task = TASKS[name]
    if hasattr(task, "reading"):
        return task.reading(data, offline)
    if data:
        raise UsageError(f"task {name} writes its own examples and reads no data; leave out {data!r}")
    return task


__all__ = ["TASKS", "Example", "Task", "Text", "TextTask", "find", "score"]
