"""RULER's tasks (arXiv 2404.06654) written here, for any tokenizer and length.

Owns the order of things: a generator makes a draft, the model's frame goes around it, and it grows until it is full.
What each task hides and asks for is as in RULER; wording and documents are this project's.
"""

from __future__ import annotations

from crypten_llm.errors import UsageError
from experiments.tasks.chat import Frame
from experiments.tasks.synthetic import needles, questions, variables, words
from experiments.tasks.synthetic.drafts import DRAWS, Draft, Source, longest

MAKERS = {**needles.MAKERS, **variables.MAKERS, **words.MAKERS, **questions.MAKERS}


def prompts(key: str, tokenizer, length: int, count: int, seed: int, data: str | None) -> list[tuple[Draft, str]]:
    """``count`` drafts of the task ``key``, each with its whole prompt: as long as fits into ``length`` tokens.

    data: a file of natural text, instead of that at hand. The same for the same arguments. Raises UsageError where the
    length cannot hold what the task needs.
    """
    frame, made = Frame(tokenizer), []
    for index in range(count):
        source = Source(f"{DRAWS} {key} {seed} {index}", length, data)
        draft = MAKERS[key](source)

        def whole(units: int, draft: Draft = draft) -> str:
            return frame.around(draft.message(units), draft.prefix)

        units = longest(lambda units: len(frame.ids(whole(units))) <= length, draft.least, length)  # noqa: B023
        if units is None:
            least = len(frame.ids(whole(draft.least)))
            raise UsageError(
                f"a prompt of ruler/{key} has {least:,} tokens or more, not {length:,}; give a larger length"
            )
        made.append((draft, whole(units)))
    return made
