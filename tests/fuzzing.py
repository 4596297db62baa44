"""Mutated inputs for whatever reads what others have written, within limits of time and memory.

Owns the mutations, the limits and the readers with their seed corpora (``READERS``). A reader takes bytes; it may
return or raise the project's own errors, in one line, and nothing else. Every input follows from a seed and its number,
so that one that fails can be made again: ``PYTHONPATH=.:tests python tests/fuzzing.py NAME SEED NUMBER``.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_files
import tapes
import torch
from hf_models import BASE, tiny
from policy_table import ROWS
from public_configs import ACCEPTED

from crypten_llm.errors import CryptenLLMError
from crypten_llm.links import frames
from crypten_llm.links.meter import Counters, Meter
from crypten_llm.links.transport import Transport
from crypten_llm.models import checkpoint, gguf_file, gguf_tokenizer, tokenizer
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer.layout import Header, begin, path_in, read_begin
from crypten_llm.records import Malformed, decode, plain
from crypten_llm.roles import OWNER
from crypten_llm.session import messages
from crypten_llm.session.bench import Shape
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.generation import Decision
from crypten_llm.session.plan import Plan, Turn
from crypten_llm.session.settings import Agreement, ProtocolConfig
from crypten_llm.session.sizes import of_bench, of_requests

SECONDS = 5.0  # for one input
MEBIBYTES = 1024  # of address space beyond what the process has, for one input
ODD = (
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 10**9),
    *("", "\x00", "\x1b[2J", "é\u202e", "a" * 5000, "../x", "/etc/passwd", "NaN", [], {}, [[]], [None], {"": None}),
)


@dataclass(frozen=True)
class Reader:
    """corpus: sound inputs. read: what must take any. is_json: whether values are changed too, not bytes alone."""

    corpus: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    is_json: bool = True


def mutated(reader: Reader, seed: int, number: int) -> bytes:
    """Input ``number`` of those that follow from ``seed``."""
    rng = random.Random(f"{seed}/{number}")
    data = rng.choice(reader.corpus)
    if reader.is_json and rng.random() < 0.7:
        value = json.loads(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            value = _other_value(value, rng)
        with contextlib.suppress(ValueError):
            return _written(value, rng)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data = _other_bytes(data, rng, reader.corpus)
    return data


def _written(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace("null", "NaN", 1).replace(": 1", ": -Infinity", 1)
    if rng.random() < 0.02:
        depth = rng.choice((50, 500, 20_000))
        text = text.replace("null", "[" * depth + "]" * rng.choice((0, depth)), 1) if "null" in text else "[" * depth
    return text.encode()


def _other_value(value: Any, rng: random.Random) -> Any:
    """The same with one value, key or element changed, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {name: entry for name, entry in value.items() if name != key}
            case 1:
                return {**value, str(rng.choice(ODD)): rng.choice(ODD)}
            case 2:
                return {**value, key: value[rng.choice(list(value))]}
            case _:
                return {**value, key: _other_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value + value[place:] * rng.choice((1, 2, 100))
            case _:
                return [*value[:place], _other_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        with contextlib.suppress(OverflowError):
            return rng.choice((-value, value + 1, value - 1, value * 2**20, value / 2, str(value), value**20))
    return rng.choice(ODD)


def _other_bytes(data: bytes, rng: random.Random, corpus: tuple[bytes, ...]) -> bytes:
    place = rng.randrange(len(data) + 1)
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        case 2:
            return data[:place] + rng.randbytes(rng.choice((1, 2, 8, 64))) + data[place:]
        case 3:
            return data[:place] + data[place + rng.choice((1, 2, 8, 64)) :]
        case 4:
            return data[:place] + rng.choice((b"\xff", b"\x00", b"\x7f")) * rng.choice((1, 4, 8)) + data[place + 8 :]
        case 5:
            other = rng.choice(corpus)
            return data[:place] + other[rng.randrange(len(other) + 1) :]
        case _:
            return data[:place] + data[max(0, place - rng.choice((1, 4, 32))) :]


# Limits.


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Memory beyond ``MEBIBYTES`` is refused to this process, so whoever asks for it fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEBIBYTES << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Hang(BaseException):
    """No Exception: nobody may take it for one of a library's."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"no answer within {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, count: int, seed: int, first: int = 0) -> tuple[int, int]:
    """Reads ``count`` mutated inputs; returns how many were taken and how many refused.

    Raises AssertionError with the input's number for anything else.
    """
    reader, taken = READERS[name](), 0
    for data in reader.corpus:
        reader.read(data)  # raises where a sound input is refused
    with limited():
        for number in range(first, first + count):
            data = mutated(reader, seed, number)
            try:
                with in_time():
                    reader.read(data)
                taken += 1
            except CryptenLLMError as error:
                assert str(error).isprintable() and len(str(error)) < 2010, f"{name} {seed} {number}: {str(error)!r}"
                assert not isinstance(error.__cause__ or error.__context__, MemoryError), f"{name} {seed} {number}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(f"{name} {seed} {number}: {error!r} of {data[:200]!r}") from error
    return taken, count - taken


# Readers.


def _text(value: object) -> bytes:
    return json.dumps(value).encode()


SMALL = {"model_type": "llama", **BASE}


def _in_folder(name: str, read: Callable[[Path], Any], **beside: Any) -> Callable[[bytes], Any]:
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
    for other, content in beside.items():
        (folder / f"{other}.json").write_text(json.dumps(content))

    def written(data: bytes) -> Any:
        (folder / name).write_bytes(data)
        return read(folder)

    return written


def config() -> Reader:
    def read(folder: Path) -> None:
        found = LlamaConfig.from_folder(folder)
        assert LlamaConfig.from_dict(found.to_dict()) == found and found.parameters

    corpus = [_text(SMALL), *(_text(content) for content, _ in ACCEPTED.values())]
    return Reader(tuple(corpus), _in_folder("config.json", read))


def generation_config() -> Reader:
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    corpus = (
        {"eos_token_id": 2, "bos_token_id": 1, "max_new_tokens": 5},
        {"eos_token_id": [1, 2], **sampling, "repetition_penalty": 1.1, "transformers_version": "4.1", "a": None},
        {"num_beams": 1, "guidance_scale": 1.0, "suppress_tokens": None, "eos_token_id": [2]},
    )

    def read(folder: Path) -> None:
        found = Defaults.of_folder(folder)
        str(found), LlamaConfig.from_folder(folder)

    return Reader(tuple(map(_text, corpus)), _in_folder("generation_config.json", read, config=SMALL))


def index() -> Reader:
    folder, _ = tiny(tempfile.mkdtemp(prefix="fuzzing-"), num_hidden_layers=1, max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    sound, sizes = path.read_bytes(), LlamaConfig.from_folder(folder)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint.load_weights(folder, sizes)

    return Reader((sound,), read)


def vocabulary() -> Reader:
    special = {"id": 0, "content": "<s>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    special |= {"single_word": False}
    ids = {"<s>": 0, "a": 1, "b": 2, "ab": 3}
    byte_pairs = {"type": "BPE", "vocab": ids, "merges": [["a", "b"]], "unk_token": None}
    pieces = {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.5]]}
    splits = {"type": "Split", "pattern": {"Regex": "(a|b)+"}, "behavior": "Isolated", "invert": False}
    corpus = (
        {"version": "1.0", "added_tokens": [special], "pre_tokenizer": splits, "model": byte_pairs},
        {"version": "1.0", "added_tokens": [], "normalizer": {"type": "NFC"}, "model": pieces},
    )
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}

    def read(folder: Path) -> None:
        tokenizer.digest(folder)
        loaded = tokenizer.load(folder)
        tokenizer.decode(loaded, tokenizer.encode_prompt(loaded, "ab a"))

    written = _in_folder("tokenizer.json", read, config={"model_type": "llama"}, tokenizer_config=names)
    return Reader(tuple(map(_text, corpus)), written)


def gguf() -> Reader:
    folder, _ = tiny(tempfile.mkdtemp(prefix="fuzzing-"), num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    texts = {"tokens": ["<s>", "</s>", "a", "b", "ab"], "merges": ["a b"], "token_type": [3, 3, 1, 1, 1]}
    added = {"model": "gpt2", "pre": "smollm", "add_bos_token": True, **texts}
    path = gguf_files.write(folder, add={f"tokenizer.ggml.{key}": value for key, value in added.items()})
    sound = path.read_bytes()
    other = path.with_name("other.gguf")
    number = iter(range(1 << 60))

    def read(data: bytes) -> None:
        place = other.with_name(f"{next(number)}.gguf")  # what was opened is remembered by its name
        place.write_bytes(data)
        try:
            found = LlamaConfig.from_folder(place)
            gguf_tokenizer.vocabulary(place)
            for _ in checkpoint.load_weights(place, found):
                pass
        finally:
            place.unlink()
            gguf_file._opened.cache_clear()

    return Reader((sound,), read, is_json=False)


def message() -> Reader:
    """Every kind in turn: what is sound as one is hostile as all others."""
    plan, shape = Plan(3, 2, public_prefix=(1, 2)), Shape(hidden=64, heads=4, kv_heads=2, ffn=64, vocab=97)
    meter = Meter()
    meter.count("online", 1, 1, 10, 10, 0.5)
    sent = (
        *(messages.Load(), messages.Generate((plan,), Turn(1, 4)), messages.Generate((plan, Plan(9, 1, policy="h2o")))),
        *(messages.Forget(1), messages.Bench(shape), messages.Statistics(), messages.Close(), messages.Loading(1, 2)),
        messages.Announced(SMALL, {"model.norm.weight": 4.0}, "0" * 64, "scores"),
        *(Decision([0, 1]), Decision(False), ProtocolConfig().agreement()),
        {"rank": 0, "table": meter.counts(), "peak_bytes": 5, "dealer": {"rank": 2, "table": [], "peak_bytes": 1}},
    )
    kinds = (messages.Request, messages.OwnerSays, Decision, Agreement, Counters)
    known = LlamaConfig.from_dict(SMALL)

    def read(data: bytes) -> None:
        said, reasons = None, []
        for kind in kinds:
            try:
                said = decode(data, kind)
            except Malformed as error:
                assert str(error).isprintable()
                reasons.append(error)
        match said:
            case messages.Generate(plans, turn):
                for each in plans:
                    each.check(known, turn.cached_tokens if turn else 0)
                of_requests(known, plans, 5, 8)
            case messages.Bench(asked):
                of_bench(asked, 8)
            case messages.Announced(config):
                checkpoint.expected_shapes(LlamaConfig.from_dict(config))
        if len(reasons) == len(kinds):
            raise CryptenLLMError(str(reasons[0]))

    return Reader(tuple(_text(plain(each)) for each in sent), read)


def tape() -> Reader:
    """The header of the owner's file; what decides must be as it was dealt, or it is refused."""
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-")) / "tape"
    tapes.record(folder)
    path = path_in(folder, OWNER)
    whole = path.read_bytes()
    with path.open("rb") as file:
        begun = read_begin(file.fileno())
    dealt = decode(begun.header, Header)

    def read(data: bytes) -> None:
        path.write_bytes(begin(data, begun.key, max(len(data), len(begun.header))) + whole[begun.start :])
        opened = tapes.open_tape(path, OWNER)
        opened.close()
        assert opened.manifest == dealt.manifest and decode(data, Header) == dealt

    return Reader((begun.header.strip(),), read)


def policy() -> Reader:
    """The text of a policy in a plan."""
    known = LlamaConfig.from_dict(SMALL)

    def read(data: bytes) -> None:
        plan = Plan(30, 2, policy=data.decode("utf-8", "surrogateescape"))
        assert Plan(30, 2, policy=plan.policy).policy == plan.policy
        plan.check(known)
        of_requests(known, (plan,), 0, 8)

    rows = ((name, (row.small, row.everything, row.least)) for name, row in ROWS.items())
    return Reader(tuple(f"{name}({text})".encode() for name, texts in rows for text in texts), read, is_json=False)


def frame() -> Reader:
    """Bytes on a link on which a tensor is due, then JSON, then a stream."""

    def header(kind: int, dtype: int, sequence: int, size: int) -> bytes:
        return frames.HEADER.pack(frames.MAGIC, kind, dtype, sequence, size, 0)

    tensor = header(frames.TENSOR, frames.DTYPES[torch.int64], 0, 16) + bytes(16)
    text = header(frames.JSON, 0, 1, 14) + b'{"stop":false}'
    stream = header(frames.STREAM, 0, 2, 5) + b"12345"
    last = header(frames.ABORT, 0, 0, 6) + b"reason"

    def read(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        transport = Transport(0, ("owner", "client"), {1: ours}, timeout=0.001)
        try:
            theirs.setblocking(False)
            theirs.send(data)
            theirs.close()
            transport.recv(1, (2,), torch.int64)
            transport.recv_json(1, Decision, max_bytes=1000)
            transport.stream_from(1, 1000).read(5)
        finally:
            transport.close()

    sound = tensor + text + stream
    return Reader((sound, sound + last), read, is_json=False)


READERS: dict[str, Callable[[], Reader]] = {
    made.__name__: made for made in (config, generation_config, index, vocabulary, gguf, message, policy, tape, frame)
}


if __name__ == "__main__":
    asked, its_seed, its_number = sys.argv[1:]
    one = READERS[asked]()
    print(mutated(one, int(its_seed), int(its_number)))
    with limited(), in_time():
        one.read(mutated(one, int(its_seed), int(its_number)))
