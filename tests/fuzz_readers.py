"""Readers that are fuzzed, each with sound inputs to begin from: whatever reads what others have written has one here.

Owns ``READERS``; what becomes of the inputs is in ``fuzzing``.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import tapes
import torch
from fuzzing import Reader, in_time, limited, mutated
from hf_models import BASE, tiny
from policy_table import ROWS
from public_configs import ACCEPTED

from crypten_llm.engines.base import Held
from crypten_llm.errors import CryptenLLMError
from crypten_llm.links import frames
from crypten_llm.links.meter import Meter
from crypten_llm.links.transport import Transport
from crypten_llm.models import checkpoint, gguf_file, gguf_tokenizer, tokenizer
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer.layout import Header, begin, path_in, read_begin
from crypten_llm.protocols.dealer.peer import Offer
from crypten_llm.records import Malformed, decode, plain
from crypten_llm.roles import OWNER
from crypten_llm.session import delivery, messages, thin_words
from crypten_llm.session.bench import Shape
from crypten_llm.session.counting import Told
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.doors import Introduction, Knock
from crypten_llm.session.generation import Decision
from crypten_llm.session.plan import Plan, Turn, check_turns
from crypten_llm.session.scheduler import Next
from crypten_llm.session.series import Series
from crypten_llm.session.settings import Agreement, ProtocolConfig
from crypten_llm.session.sizes import of_bench, of_requests
from crypten_llm.session.thin_words import Ended, Form, Ready, Shown


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
        *(
            messages.Load(),
            messages.Generate((plan,), (Turn(1, 4, False),)),
            messages.Generate((plan, Plan(9, 1, policy="h2o"))),
        ),
        *(messages.Forget(1), messages.Bench(shape), messages.Statistics(), messages.Close(), messages.Loading(1, 2)),
        *(messages.Enter("0" * 64), Knock("0" * 64, ProtocolConfig().agreement()), Introduction("0" * 64, "a" * 64)),
        *(Shown((Form((1, 97), 34, 16), Form((5,), 17, 0))), Ready(SMALL, None, "", ()), Ended([], (), None)),
        *(messages.Offered((("a" * 16, "0" * 64),)), messages.Stocks(("a" * 16,)), messages.Chosen("a" * 16)),
        *(delivery.Ask("b" * 16), delivery.Reserve("a" * 16, 100), delivery.Deliver(), delivery.Order(plan, 3, 0.5)),
        delivery.Terms(Series("a" * 64, "0" * 64, SMALL, "logits", "default")),
        Offer("GPU-1", "0" * 128),
        messages.Announced(SMALL, {"model.norm.weight": 4.0}, "0" * 64, "scores"),
        *(
            Decision([0, 1]),
            Decision(False),
            Next((0, 2), (plan, Plan(5, 3)), (None, Turn(2)), (1,)),
            ProtocolConfig().agreement(),
        ),
        {"rank": 0, "table": meter.counts(), "peak_bytes": 5, "dealer": {"rank": 2, "table": [], "peak_bytes": 1}},
    )
    kinds = (messages.Request, messages.OwnerSays, Decision, Next, Agreement, Told)
    kinds += (thin_words.Request, Knock, Introduction, thin_words.Event, Ready | thin_words.Refused)
    kinds += (delivery.FromProducer, delivery.Terms, delivery.Order, delivery.Answer, messages.Chosen, Offer)
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
            case messages.Generate(plans, turns):
                check_turns(turns, len(plans), ())
                for each, turn in zip(plans, turns or [None] * len(plans), strict=True):
                    each.check(known, turn)
                of_requests(known, plans, 8)
            case messages.Bench(asked):
                of_bench(asked, Held(8, 16))
            case delivery.Terms(series) if series is not None:
                LlamaConfig.from_dict(series.config)
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
        of_requests(known, (plan,), 8)

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
