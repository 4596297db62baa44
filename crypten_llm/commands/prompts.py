"""A file of prompts and a file of answers: JSON lines in and out, as many prompts at once as share their rounds.

Owns both formats. An answer is written when its group has ended, so that a run that was ended can be taken up again:
what is answered is kept, and nothing is answered twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from tqdm import tqdm

from crypten_llm import records
from crypten_llm.commands.command_line import read_text
from crypten_llm.commands.show import closed, say, say_decoding, say_outside, who
from crypten_llm.errors import LeftRange, UsageError
from crypten_llm.session.api import BATCH, PrivateLlama
from crypten_llm.session.prompted import Step
from crypten_llm.session.report import ledger, revealed_table
from crypten_llm.session.request import Asked, Request, Result
from crypten_llm.session.settings import check_names, split
from crypten_llm.units import size

_OF_A_LINE = ("id", "prompt", "messages", "max_new_tokens")


@dataclass(frozen=True)
class Entry:
    """One line of prompts. digest: of all that decides its answer, so that another's is not taken for it."""

    id: str | int
    request: Request
    digest: str


def answer_file(
    prompts: str, out: str, asked: dict, batch_size: int | None, model: str, tokenizer: str | None, **settings: Any
) -> None:
    """Answers every prompt of the file that has no answer yet; asked: fields of ``Request`` that hold for each.

    Raises UsageError for a line that is no prompt, and for answers to other prompts.
    """
    protocol, launched = split(settings)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; it must be 1 or more")
    entries = read_prompts(prompts, asked, model)
    done = read_answers(out, entries)
    left = [entry for entry in entries if entry.id not in done]
    say(f"{len(entries)} prompts, {len(done)} answered already")
    if not left:
        return
    at_once = 1 if protocol.tape else batch_size or BATCH
    if protocol.tape:
        say("a tape is dealt for one prompt at a time: none share their rounds")
    say(who(protocol))
    with PrivateLlama.from_pretrained(model, tokenizer=tokenizer, first=left[0].request, **settings) as llama:
        say(f"model shared in {llama.load_seconds:.1f} s")
        say_outside(llama)
        prepared = [_prepared(llama, entry) for entry in left]
        say_decoding(llama, prepared[0])
        started, shown, results = perf_counter(), [], []
        bar = tqdm(desc="answers", total=len(left), disable=not launched.progress, leave=False)
        with bar, open(out, "a", encoding="utf-8") as file:
            for start in range(0, len(left), at_once):
                group, ready = left[start : start + at_once], prepared[start : start + at_once]
                steps: list[list[Step]] = [[] for _ in group]
                try:
                    with closed(llama.stream([entry.request for entry in group], batch_size=at_once)) as events:
                        for event in events:
                            if isinstance(event, Step):
                                steps[event.prompt].append(event)
                                bar.update(event.finish_reason is not None)
                except LeftRange as error:
                    unanswered = _write(file, group, ready, steps, llama.party.outside)
                    raise LeftRange(_left_range(error, unanswered)) from None
                _write(file, group, ready, steps, llama.party.outside)
                shown.append(llama.result[0])  # what a group cost, and what it revealed, is the same of all in it
                results += llama.result
        seconds, loaded = perf_counter() - started, llama.party.load_reveals.as_list()
        say_outside(llama)
    _say_summary(results, shown, seconds)
    say(revealed_table(ledger(loaded, [result.revealed for result in shown])))


def _prepared(llama: PrivateLlama, entry: Entry) -> Any:
    try:
        return llama.prepare(entry.request)
    except UsageError as error:
        raise UsageError(f"prompt {entry.id!r}: {error}") from None


def _write(file: TextIO, group: list[Entry], ready: list[Asked], steps: list[list[Step]], outside: str) -> list[Entry]:
    """Adds the answers that have ended, and returns those that have not."""
    unanswered = []
    for entry, asked, taken in zip(group, ready, steps, strict=True):
        if taken and taken[-1].finish_reason:
            file.write(json.dumps(_line(entry, len(asked.ids), taken, outside)) + "\n")
        else:
            unanswered.append(entry)
    file.flush()
    os.fsync(file.fileno())
    return unanswered


def _line(entry: Entry, prompt_tokens: int, steps: list[Step], outside: str) -> dict:
    found: dict[str, Any] = {
        "id": entry.id,
        "text": "".join(step.text for step in steps),
        "token_ids": [step.token_id for step in steps],
        "prompt_tokens": prompt_tokens,
        "finish_reason": steps[-1].finish_reason,
        "request": entry.digest,
    }
    if outside:
        found["outside"] = outside
    if entry.request.logprobs is not None:
        found["logprobs"] = [asdict(step.logprobs) for step in steps if step.logprobs]
    return found


def _left_range(error: LeftRange, unanswered: list[Entry]) -> str:
    names = ", ".join(repr(entry.id) for entry in unanswered)
    if len(unanswered) == 1:
        return f"prompt {names}: {error}; finished answers are kept: take this prompt out and run again"
    return f"one of the prompts {names}: {error}; finished answers are kept: --batch-size 1 finds which"


def _say_summary(results: list[Result], groups: list[Result], seconds: float) -> None:
    tokens = sum(len(result.token_ids) for result in results)
    line = f"{len(results)} answers of {tokens} tokens in {seconds:.1f} s"
    costs = [group.cost for group in groups]
    if rounds := sum(cost.rounds() for cost in costs):
        sent, dealt = sum(max(cost.bytes_sent()) for cost in costs), sum(cost.dealer_bytes() for cost in costs)
        line += f": {rounds:,} rounds, {size(sent)} sent a party, {size(dealt)} with the dealer"
    say(line)


def read_prompts(path: str, asked: dict, model: str) -> list[Entry]:
    """The prompts of a file, in its order; one without an id has the number of its line. Raises UsageError."""
    entries: dict[str | int, Entry] = {}
    for number, text in enumerate(read_text("--prompts", path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            entry = _entry(text, number, asked, model)
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if entry.id in entries:
            raise UsageError(f"{path}, line {number}: the id {entry.id!r} is another line's; each needs its own")
        entries[entry.id] = entry
    if not entries:
        raise UsageError(f'{path} holds no prompt; write lines such as {{"prompt": "..."}}')
    return list(entries.values())


def _entry(text: str, number: int, asked: dict, model: str) -> Entry:
    found = _object(text)
    check_names("key", found, _OF_A_LINE)
    name = found.pop("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UsageError(f"the id is {name!r}; it must be a text or a whole number")
    settings = {**asked, **found}
    if "messages" in found:
        if asked.get("system") is not None:
            raise UsageError("--system is for prompts; of messages, the first may be the system's")
        settings["chat"] = False
    request = Request(**settings)
    given = {key: value for key, value in settings.items() if value is not None and key != "hide_length"}
    decides = json.dumps({**given, "model": model}, sort_keys=True)
    return Entry(name, request, hashlib.sha256(decides.encode()).hexdigest()[:16])


def _object(text: str) -> dict:
    try:
        return records.decode(text, dict[str, Any])
    except records.Malformed as error:
        raise UsageError(f'{error}; write one object a line, such as {{"prompt": "..."}}') from None


def read_answers(path: str, entries: list[Entry]) -> set[str | int]:
    """Ids of the prompts that have an answer in the file; a line that was cut when a run was ended is removed.

    Raises UsageError for answers to other prompts, or to these with other settings.
    """
    file = Path(path)
    if not file.exists():
        if not file.parent.is_dir():
            raise UsageError(f"--out: there is no folder {file.parent}; make it first")
        return set()
    text = read_text("--out", path)
    whole = text[: text.rfind("\n") + 1]
    known, done = {entry.id: entry for entry in entries}, set()
    for number, line in enumerate(whole.split("\n")[:-1], 1):
        try:
            found = _object(line)
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        name = found.get("id")
        entry = known.get(name) if isinstance(name, str | int) else None
        if entry is None or entry.digest != found.get("request"):
            raise UsageError(
                f"{path}, line {number}: an answer to another prompt than {name!r} here, or by another model or "
                "settings; name another file with --out"
            )
        done.add(entry.id)
    if len(whole) < len(text):
        file.write_text(whole, "utf-8")
    return done
