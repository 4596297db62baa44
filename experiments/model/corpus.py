"""Synthetic English documents with questions whose answers stand in the text.

Every sample is a document of seeded prose with facts spread uniformly over it, followed by a question. A task is
one function from a `Writer` and a size to a `Draft` (facts, questions, prose) and one row of `TASKS`; placing the
facts, filling up to the length wanted and turning it all into text or training tokens is common to all.

Held-out samples differ from training samples twice: by seed, and by content. A fact joins two things (a name and a
city, a record and its number); a hash puts one joint in eight on the held-out side, held-out documents state only
such facts, training documents never do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random
from zlib import crc32

import numpy as np

from experiments.model.lexicon import CHAINS, FILLER, POOLS, RELATIONS, TOPICS

SPLITS = ("train", "heldout")
HELD_OUT_ONE_IN = 8
MAX_ANSWER_TOKENS = 24
"""Room for every answer and the end-of-sequence token after it; the longest answers have 16."""
PAD, PROSE, ANSWER = 0, 1, 2
"""Kinds of training targets: no loss, prose (low weight), answer (full weight)."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its expected continuation.

    `facts` are the (start, end) character spans, within `prompt`, of the sentences that the answer follows from.
    `answer` begins with a space and is followed by the end-of-sequence token; it is empty for plain stories.
    """

    task: str
    prompt: str
    answer: str
    facts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Question:
    """`prompt` as written after the document, `answer`, and the indices into `Draft.facts` that it needs.

    `bridge` is the word between two hops, which training may ask the middle of the model to hold.
    """

    prompt: str
    answer: str
    facts: tuple[int, ...] = ()
    bridge: str = ""


@dataclass
class Draft:
    """What a task hands over: the pieces of a document before they are put in order.

    `questions[0]` is the task's own question, the one asked in evaluation; the others serve training alone.
    `prose` is called for one more piece, a text and the answer that ends it (mostly empty), until the document is
    full. Facts keep their order when `ordered`.
    """

    opening: str
    facts: list[str]
    questions: list[Question]
    prose: Callable[[], tuple[str, str]]
    ordered: bool = False


def is_held_out(*parts: str) -> bool:
    """Whether a fact that joins `parts` belongs to the held-out side."""
    return crc32("|".join(parts).encode()) % HELD_OUT_ONE_IN == 0


@cache
def partners(split: str, relation: str, subject: str) -> tuple[str, ...]:
    """Objects that `subject` may have under `relation` in `split`."""
    objects = POOLS[RELATIONS[relation][1]]
    held_out = split == "heldout"
    fitting = tuple(o for o in objects if o != subject and is_held_out(relation, subject, o) == held_out)
    # A small pool may have no held-out partner: such a subject then gets no fact of this relation.
    return fitting


def _compile(pattern: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    pools = tuple(POOLS[name] for name in re.findall(r"{(\w+)}", pattern))
    return re.sub(r"{\w+}", "%s", pattern), pools


_FILLER = [_compile(pattern) for pattern in FILLER]
_with_n = re.compile(r"\b([Aa]) (?=[aeiou])").sub


def _articles(text: str) -> str:
    """`a otter` becomes `an otter`."""
    return _with_n(r"\1n ", text)


class Writer:
    """A seeded source of choices for one document of one split."""

    def __init__(self, seed: str, split: str):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        self.rng, self.split = Random(f"{seed}/{split}"), split
        self.choice, self.random = self.rng.choice, self.rng.random

    def sentence(self) -> str:
        """One sentence of prose."""
        pattern, pools = self.choice(_FILLER)
        return _articles(pattern % tuple([self.choice(pool) for pool in pools]))

    def prose(self) -> tuple[str, str]:
        """One piece of prose; about every sixth opens a paragraph."""
        return ("\n" if self.random() < 0.17 else " ") + self.sentence(), ""

    def documents(self) -> Callable[[], tuple[str, str]]:
        """Prose broken into numbered short documents."""
        count = 0

        def piece() -> tuple[str, str]:
            nonlocal count
            if self.random() > 0.2:
                return " " + self.sentence(), ""
            count += 1
            return f"\nDocument {count}: {self.sentence()}", ""

        return piece

    def number(self, digits: int, *owner: str) -> str:
        """A number that may belong to `owner` in this split."""
        while True:
            text = str(self.rng.randrange(10 ** (digits - 1), 10**digits))
            if is_held_out(*owner, text) == (self.split == "heldout"):
                return text

    def distinct(self, pool: str, count: int) -> list[str]:
        """`count` different words of a pool, at most all of them."""
        return self.rng.sample(POOLS[pool], min(count, len(POOLS[pool])))


class FactBook:
    """Facts of one document; a subject has one object per relation."""

    def __init__(self, writer: Writer):
        self.writer, self.facts, self.index, self.objects = writer, [], {}, {}

    def add(self, relation: str, subject: str) -> str | None:
        """States the fact (once) and returns its object, or None where the split has no partner for it."""
        if (relation, subject) in self.objects:
            return self.objects[relation, subject]
        candidates = partners(self.writer.split, relation, subject)
        if not candidates:
            return None
        obj = self.writer.choice(candidates)
        self.index[relation, subject] = len(self.facts)
        self.objects[relation, subject] = obj
        self.facts.append(" " + _articles(self.writer.choice(RELATIONS[relation][2]).format(a=subject, b=obj)))
        return obj

    def question(self, relation: str, subject: str) -> Question:
        text = RELATIONS[relation][3].format(a=subject)
        return ask(text, self.objects[relation, subject], self.index[relation, subject])


def ask(text: str, answer: str, *facts: int, bridge: str = "") -> Question:
    """A question in the form that all tasks share."""
    return Question(f"\nQuestion: {text}\nAnswer:", f" {answer}", facts, bridge)


def stories(writer: Writer, size: int) -> Draft:
    """Prose alone, for perplexity."""
    return Draft("Once there was a small town.", [], [], writer.prose)


def passkey(writer: Writer, size: int) -> Draft:
    """One to four numbers hidden in prose."""
    places = writer.distinct("place", writer.rng.randint(1, 4 if size >= 128 else 1))
    keys = [writer.number(5, "passkey", place) for place in places]
    return Draft(
        "There is important information hidden in this text.",
        [f" The pass key of the {p} is {k}. Remember it." for p, k in zip(places, keys, strict=True)],
        [ask(f"What is the pass key of the {p}?", k, i) for i, (p, k) in enumerate(zip(places, keys, strict=True))],
        writer.prose,
    )


def key_value(writer: Writer, size: int) -> Draft:
    """Many records, each a name of two words and a number of four digits."""
    keys = {f"{writer.choice(POOLS['quality'])} {writer.choice(POOLS['noun'])}" for _ in range(max(2, size // 40))}
    keys = sorted(keys)
    writer.rng.shuffle(keys)
    values = [writer.number(4, "record", key) for key in keys]
    return Draft(
        "Here are the notes and the records of the archive.",
        [f" Record {k} holds {v}." for k, v in zip(keys, values, strict=True)],
        [ask(f"What does record {k} hold?", v, i) for i, (k, v) in enumerate(zip(keys, values, strict=True))],
        writer.prose,
    )


def one_hop(writer: Writer, size: int) -> Draft:
    """Facts about people, things and companies, and a question about one of them."""
    book, asked = FactBook(writer), []
    relations = list(RELATIONS)
    people = writer.distinct("name", max(3, size // 100))
    wanted = max(2, size // 40)
    while len(book.facts) < wanted:
        relation = writer.choice(relations)
        pool = RELATIONS[relation][0]
        # Few people with many facts each: both the subject and the relation are needed to find the answer.
        subject = writer.choice(people if pool == "name" else POOLS[pool])
        if (relation, subject) not in book.objects and book.add(relation, subject):
            asked.append((relation, subject))
        elif writer.random() < 0.05:
            people.append(writer.choice(POOLS["name"]))
    writer.rng.shuffle(asked)
    return Draft(
        "Read the text about the people of the town.",
        book.facts,
        [book.question(*pair) for pair in asked],
        writer.prose,
    )


def two_hop(writer: Writer, size: int) -> Draft:
    """Many short documents; the answer follows from two facts, usually in different documents."""
    book, chained, single = FactBook(writer), [], []
    wanted = max(2, size // 40)
    while len(book.facts) < wanted:
        first, second, text = writer.choice(CHAINS)
        subject = writer.choice(POOLS[RELATIONS[first][0]])
        if (first, subject) in book.objects:
            continue
        middle = book.add(first, subject)
        if middle is None:
            continue
        single.append(book.question(first, subject))
        answer = book.add(second, middle)
        if answer is None:
            continue
        single.append(book.question(second, middle))
        hops = book.index[first, subject], book.index[second, middle]
        chained.append(ask(text.format(a=subject), answer, *hops, bridge=middle))
    if not chained:
        return two_hop(writer, size)
    writer.rng.shuffle(chained)
    rest = chained[1:] + writer.rng.sample(single, len(chained) // 3)
    writer.rng.shuffle(rest)
    return Draft("Read the documents.", book.facts, chained[:1] + rest, writer.documents())


def few_shot(writer: Writer, size: int) -> Draft:
    """Classification by topic under labels that change from prompt to prompt, shown by examples."""
    held_out = writer.split == "heldout"
    topics = writer.rng.sample(sorted(TOPICS), writer.rng.randint(2, 3 if size < 128 else 6))
    labels: dict[str, str] = {}
    for topic in topics:
        free = [w for w in POOLS["label"] if w not in labels.values() and is_held_out(topic, w) == held_out]
        if free:
            labels[topic] = writer.choice(free)
    if len(labels) < 2:
        return few_shot(writer, size)
    topics, seen = list(labels), set()

    def text(topic: str) -> str:
        things, deeds = TOPICS[topic]
        if writer.random() < 0.5:
            start = f"On {writer.choice(POOLS['day'])} the"
        else:
            start = f"{writer.choice(POOLS['name'])}'s"
        return f"{start} {writer.choice(things)} {writer.choice(deeds)} {writer.choice(POOLS['manner'])}."

    def example() -> tuple[str, str]:
        # The first examples show every class once, so that no question is about a class never seen.
        topic = topics[len(seen)] if len(seen) < len(topics) else writer.choice(topics)
        known = topic in seen
        seen.add(topic)
        piece, label = f"\nText: {text(topic)}\nLabel:", f" {labels[topic]}"
        return (piece, label) if known else (piece + label, "")

    questions = [ask(f"Which label fits: {text(topic)}", labels[topic]) for topic in writer.rng.choices(topics, k=4)]
    return Draft("Label each text like the texts before it.", [], questions, example)


def span_copy(writer: Writer, size: int) -> Draft:
    """Sentences said by people, to be repeated word by word."""
    speakers = writer.distinct("name", max(1, min(size // 80, 16)))
    spans = []
    for speaker in speakers:
        while True:
            first = writer.choice(POOLS["quality"])
            if is_held_out("span", speaker, first) == (writer.split == "heldout"):
                break
        more = range(writer.rng.randint(4, 10))
        words = [writer.choice(POOLS[writer.choice(("noun", "quality", "object"))]) for _ in more]
        spans.append(" ".join([first, *words]))
    return Draft(
        "Read what the people said.",
        [f" {a} said: {span}." for a, span in zip(speakers, spans, strict=True)],
        [ask(f"What did {a} say?", span, i) for i, (a, span) in enumerate(zip(speakers, spans, strict=True))],
        writer.prose,
    )


def variables(writer: Writer, size: int) -> Draft:
    """Chains of assignments; the value asked for was copied one to three times."""
    letters = writer.distinct("letter", max(2, min(size // 50, 24)))
    facts, values, needs, depth = [], {}, {}, {}
    for i, letter in enumerate(letters):
        sources = [x for x in values if depth[x] < 3]
        # Chains and fresh values in about equal number, and at least one of each.
        if sources and (i == 1 or writer.random() < 0.6):
            source = writer.choice(sources)
            values[letter], needs[letter], depth[letter] = values[source], (*needs[source], i), depth[source] + 1
            facts.append(f" The value of {letter} is copied from {source}.")
        else:
            values[letter], needs[letter], depth[letter] = writer.number(3, "value", letter), (i,), 0
            facts.append(f" The value of {letter} is set to {values[letter]}.")
    writer.rng.shuffle(letters)
    letters.sort(key=lambda x: depth[x] == 0)
    questions = [ask(f"What is the value of {x}?", values[x], *needs[x]) for x in letters]
    return Draft("Keep track of the values in this text.", facts, questions, writer.prose, ordered=True)


TASKS: dict[str, Callable[[Writer, int], Draft]] = {
    task.__name__: task for task in (passkey, key_value, one_hop, two_hop, few_shot, span_copy, variables, stories)
}


class Encoder:
    """Token ids of ASCII text, without the leading `<s>`, through a cache of words.

    Equal to the tokenizer on text of this corpus (tests hold it to that) and some ten times faster, which is what
    lets documents be written while the model trains.
    """

    _words = re.compile(r"'s|[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s")

    def __init__(self, tokenizer):
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self._tokenizer, self._cache = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        out, known = [], self._cache
        for word in self._words.findall(text):
            ids = known.get(word)
            if ids is None:
                ids = known[word] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            out += ids
        return out


@dataclass
class _Document:
    """Pieces in order, as (text, answer, index of the fact or None), and the draft's questions."""

    pieces: list[tuple[str, str, int | None]]
    questions: list[Question] = field(default_factory=list)


def _document(writer: Writer, draft: Draft, encode: Encoder, tokens: int, questions: list[Question]) -> _Document:
    """Spreads the facts of `draft` uniformly over prose, in at most `tokens` tokens, questions included."""
    ends = sum(len(encode(q.prompt)) for q in questions) + sum(len(encode(q.answer)) + 1 for q in questions[:-1])
    left = tokens - 1 - len(encode(draft.opening)) - ends - sum(len(encode(fact)) for fact in draft.facts)
    prose = []
    while True:
        text, answer = draft.prose()
        left -= len(encode(text + answer))
        if left < 0:
            break
        prose.append((text, answer, None))
    order = list(range(len(draft.facts)))
    if not draft.ordered:
        writer.rng.shuffle(order)
    total = len(prose) + len(order)
    slots = set(writer.rng.sample(range(total), len(order)))
    facts, rest = iter(order), iter(prose)
    pieces = [(draft.opening, "", None)]
    for i in range(total):
        if i in slots:
            fact = next(facts)
            pieces.append((draft.facts[fact], "", fact))
        else:
            pieces.append(next(rest))
    return _Document(pieces, questions)


def sample(task: str, tokens: int, index: int, encode: Encoder, split: str = "heldout", seed: int = 0) -> Sample:
    """Sample number `index` of a task; its prompt has at most `tokens` tokens, and mostly within 15 of it.

    Raises ValueError for an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    writer = Writer(f"{seed}/{task}/{tokens}/{index}", split)
    draft = TASKS[task](writer, tokens)
    asked = draft.questions[:1]
    document = _document(writer, draft, encode, tokens, asked)
    prompt, spans = "", {}
    for text, answer, fact in document.pieces:
        if fact is not None:
            spans[fact] = (len(prompt) + 1, len(prompt) + len(text))
        prompt += text + answer
    if not asked:
        return Sample(task, prompt, "")
    return Sample(task, prompt + asked[0].prompt, asked[0].answer, tuple(spans[i] for i in asked[0].facts))


def samples(
    task: str, tokens: int, count: int, encode: Encoder, split: str = "heldout", seed: int = 0
) -> Iterator[Sample]:
    """The first `count` samples of a task."""
    return (sample(task, tokens, i, encode, split, seed) for i in range(count))


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
    document = _document(writer, draft, encode, length - last, questions)
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
