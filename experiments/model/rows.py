"""Training sequences: documents of the corpus with many questions, as tokens and the kind of each as a target."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from experiments.model.corpus import Encoder, lay_out
from experiments.model.drafts import TASKS
from experiments.model.writer import Writer

PAD, PROSE, ANSWER = 0, 1, 2
"""Kinds of training targets: no loss, prose (low weight), answer (full weight)."""


@dataclass
class Row:
    """One training sequence: `ids`, the kind (PROSE, ANSWER, PAD) of each as a target, and `bridges`.

    `bridges[p]` is the id of the word between the hops where position p answers a question of two hops, else -1.
    """

    ids: list[int]
    kinds: list[int]
    bridges: list[int]

    def put(self, new: list[int], kind: int) -> None:
        self.ids += new
        self.kinds += [kind] * len(new)
        self.bridges += [-1] * len(new)


def training_row(writer: Writer, task: str, length: int, encode: Encoder) -> Row:
    """A document with many questions, each answered and ended by `</s>`; at most `length` tokens.

    Asking often multiplies the signal of a document; one row in seven has a single question, as in evaluation. Rows
    differ in how many facts they hold, up to about twice those of evaluation.
    """
    draft, questions = TASKS[task](writer, int(length * writer.rng.uniform(0.4, 1.8))), []
    # Questions get half of the sequence, or what the facts leave.
    fixed = 1 + sum(len(encode(text)) for text in (draft.opening, *draft.facts))
    room = min(length // 2, length - fixed)
    most = 1 if writer.random() < 0.15 else len(draft.questions)
    for question in draft.questions[:1] + writer.rng.sample(draft.questions[1:], max(0, len(draft.questions) - 1)):
        room -= len(encode(question.prompt)) + len(encode(question.answer)) + 1
        if room < 0 or len(questions) == most:
            break
        questions.append(question)
    last = len(encode(questions[-1].answer)) + 1 if questions else 0
    document = lay_out(writer, draft, encode, length - last, questions)
    row = Row([encode.bos], [PAD], [-1])
    for text, answer, _ in document.pieces:
        row.put(encode(text), PROSE)
        row.put(encode(answer), ANSWER)
    for question in document.questions:
        row.put(encode(question.prompt), PROSE)
        if question.bridge:
            row.bridges[-1] = encode(f" {question.bridge}")[0]
        row.put([*encode(question.answer), encode.eos], ANSWER)
    return row


def training_batch(seed: int, step: int, rows: int, length: int, mix: dict[str, float], encode: Encoder):
    """Batch number `step`, always the same for the same arguments.

    Returns three arrays (rows, length), padded on the right: ids (int16, so at most 32,768 tokens), kinds (uint8) and
    bridges (int16), as in `Row`.
    """
    ids = np.full((rows, length), encode.pad, np.int16)
    kinds = np.full((rows, length), PAD, np.uint8)
    bridges = np.full((rows, length), -1, np.int16)
    tasks = Random(f"{seed}/{step}/tasks").choices(list(mix), list(mix.values()), k=rows)
    for index, task in enumerate(tasks):
        row = training_row(Writer(f"{seed}/{step}/{index}", "train"), task, length, encode)
        for array, values in ((ids, row.ids), (kinds, row.kinds), (bridges, row.bridges)):
            array[index, : len(values)] = values[:length]
    return ids, kinds, bridges
