"""What a tape is for: public facts, which its dealer signs, and which both parties compare before they use it.

Owns the manifest, as a typed record: what a file or the other party says of a tape is read once, here, with caps.
``layout`` says how a party's file holds it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import crypten_llm
from crypten_llm import program
from crypten_llm.links.signatures import Signer, is_signed
from crypten_llm.protocols.dealer.randomness import fresh_key
from crypten_llm.roles import CLIENT, OWNER, role_names

PARTIES = (OWNER, CLIENT)
NAMES = role_names(len(PARTIES))[: len(PARTIES)]
_NOT_IN_A_TAPE = ("hide_length",)  # changes nothing that is dealt
_NOT_IN_A_FINGERPRINT = ("bos_token_id", "eos_token_id")  # as little; generation_config.json may change them
_TEXT, _FACTS, _NUMBER = 4096, 64, 1 << 53  # characters of a text, facts of a kind, and the largest number


class NotARecord(ValueError):
    """What was read is not what it must be: a name or a type is wrong, or a size is beyond its cap."""


@dataclass(frozen=True)
class Manifest:
    """version, program: of the code that dealt. engine: its settings. config: fingerprint of the model's config.json.
    verb, plan: the request, as the client announces it. requests: how many. id: drawn for this tape. signer: public key
    of who dealt. files: digest of each party's file, by role.
    """

    version: str
    program: str
    engine: dict[str, Any]
    config: str
    verb: str
    plan: dict[str, Any]
    requests: int
    id: str
    signer: str = ""
    files: dict[str, Any] | None = None

    @classmethod
    def read(cls, given: object) -> Manifest:
        """Raises NotARecord."""
        kinds: dict[str, type] = {
            name: str if name in ("version", "program", "config", "verb", "id", "signer") else dict
            for name in (field.name for field in fields(cls))
        }
        found = record(given, {**kinds, "requests": int})
        for facts in (found["engine"], found["plan"], found["files"]):
            if len(facts) > _FACTS or not all(_is_text(name) and _is_plain(fact) for name, fact in facts.items()):
                raise NotARecord("facts that no program has")
        if set(found["files"]) != set(NAMES):
            raise NotARecord("not the files of two parties")
        return cls(**found)

    def signed_by(self, signer: Signer, files: dict[str, str]) -> tuple[Manifest, bytes]:
        """With the digests of its files, and the signature of all that."""
        whole = replace(self, signer=signer.public, files=files)
        return whole, signer.sign(whole.text())

    def is_signed(self, signature: bytes) -> bool:
        return is_signed(self.text(), signature, self.signer)

    def text(self) -> bytes:
        """What is signed."""
        return b"crypten-llm tape " + json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


def make_manifest(engine: dict, config: dict, verb: str, plan: dict, requests: int) -> Manifest:
    """As ``Manifest``; config: the model's config.json."""
    return Manifest(
        version=crypten_llm.__version__,
        program=program.digest(),
        engine=engine,
        config=fingerprint(config),
        verb=verb,
        plan={name: value for name, value in plan.items() if name not in _NOT_IN_A_TAPE},
        requests=requests,
        id=fresh_key()[:8].hex(),
    )


def record(given: object, kinds: dict[str, type]) -> dict[str, Any]:
    """``given``, if it has exactly these names, of these types, within the caps. Raises NotARecord."""
    if not isinstance(given, dict) or set(given) != set(kinds):
        raise NotARecord("other names")
    for name, kind in kinds.items():
        value = given[name]
        fits = _is_text(value) if kind is str else _is_number(value) if kind is int else type(value) is kind
        if not fits:
            raise NotARecord(f"{name} is no {kind.__name__} that it may be")
    return given


def from_json(text: bytes) -> object:
    """JSON of another's making. Raises NotARecord, also for what JSON does not know (NaN) and for deep nesting."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NotARecord("no JSON") from None


def _refuse(word: str) -> None:
    raise NotARecord(f"{word} is no number")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _TEXT and value.isprintable()


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= _NUMBER


def _is_plain(value: object) -> bool:
    return isinstance(value, bool) or _is_text(value) or _is_number(value)


def fingerprint(config: dict) -> str:
    """Of what decides in a model's public configuration what is dealt."""
    architecture = {name: value for name, value in config.items() if name not in _NOT_IN_A_FINGERPRINT}
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()[:16]


def command(verb: str, plan: dict) -> str:
    """The command that deals a tape for ``plan``."""
    first = "--bench" if verb == "bench" else "--model MODEL"
    given = {name: value for name, value in plan.items() if name not in _NOT_IN_A_TAPE and value != 0}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join(["python -m crypten_llm deal", first, *options, "--out DIR"])
