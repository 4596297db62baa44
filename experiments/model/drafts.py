"""The tasks of the corpus: each is one function from a `Writer` and a size to a `Draft`, and one row of `TASKS`."""

from __future__ import annotations

from collections.abc import Callable

from experiments.model.lexicon import CHAINS, POOLS, RELATIONS, TOPICS
from experiments.model.writer import Draft, FactBook, Writer, ask, is_held_out


def stories(writer: Writer, size: int) -> Draft:
    """Prose alone, for perplexity."""
    return Draft("Once there was a small town.", [], [], writer.prose)


def _look_up(writer: Writer, opening: str, fact: str, question: str, values: dict[str, str]) -> Draft:
    """A fact for each key and its value, and a question after each value; fact, question: patterns."""
    facts = [fact.format(key, value) for key, value in values.items()]
    questions = [ask(question.format(key), value, i) for i, (key, value) in enumerate(values.items())]
    return Draft(opening, facts, questions, writer.prose)


def passkey(writer: Writer, size: int) -> Draft:
    """One to four numbers hidden in prose."""
    places = writer.distinct("place", writer.rng.randint(1, 4 if size >= 128 else 1))
    return _look_up(
        writer,
        "There is important information hidden in this text.",
        *(" The pass key of the {} is {}. Remember it.", "What is the pass key of the {}?"),
        {place: writer.number(5, "passkey", place) for place in places},
    )


def key_value(writer: Writer, size: int) -> Draft:
    """Many records, each a name of two words and a number of four digits."""
    keys = {f"{writer.choice(POOLS['quality'])} {writer.choice(POOLS['noun'])}" for _ in range(max(2, size // 40))}
    keys = sorted(keys)
    writer.rng.shuffle(keys)
    return _look_up(
        writer,
        "Here are the notes and the records of the archive.",
        *(" Record {} holds {}.", "What does record {} hold?"),
        {key: writer.number(4, "record", key) for key in keys},
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
    said = {}
    for speaker in speakers:
        while True:
            first = writer.choice(POOLS["quality"])
            if is_held_out("span", speaker, first) == (writer.split == "heldout"):
                break
        more = range(writer.rng.randint(4, 10))
        words = [writer.choice(POOLS[writer.choice(("noun", "quality", "object"))]) for _ in more]
        said[speaker] = " ".join([first, *words])
    return _look_up(writer, "Read what the people said.", " {} said: {}.", "What did {} say?", said)


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
