"""What a tape is for: public facts, which its dealer signs, and which both parties compare before they use it.

Owns the manifest, as a typed record: what a file or the other party says of a tape is read once, here, with caps.
``layout`` says how a party's file holds it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

import crypten_llm
from crypten_llm import program
from crypten_llm.links.signatures import Signer, is_signed
from crypten_llm.protocols.dealer.randomness import fresh_key
from crypten_llm.records import Count, Digest, Record, Word, Words, plain
from crypten_llm.roles import CLIENT, OWNER, role_names

PARTIES = (OWNER, CLIENT)
NAMES = role_names(len(PARTIES))[: len(PARTIES)]
_NOT_IN_A_TAPE = ("hide_length", "pads")  # change nothing that is dealt
_USUAL = (0, "logits")  # what no option needs to say
_NOT_IN_A_FINGERPRINT = ("bos_token_id", "eos_token_id")  # as little; generation_config.json may change them
Fact = bool | Count | float | Words
Facts = Annotated[dict[Word, Fact], Meta(max_length=64)]
Party = Annotated[str, Meta(pattern=f"^({'|'.join(NAMES)})$")]


class Manifest(Record, frozen=True):
    """version, program: of the code that dealt. engine: its settings. config: fingerprint of the model's config.json.
    verb, plan: the request, as the client announces it. requests: how many. id: drawn for this tape. signer: public key
    of who dealt. files: digest of each party's file. series: of a block for a stock, the masks of weights that it is
    dealt for (``session.series``).
    """

    version: Word
    program: Word
    engine: Facts
    config: Word
    verb: Word
    plan: Facts
    requests: Count
    id: Word
    signer: Words
    files: Annotated[dict[Party, Digest], Meta(min_length=len(NAMES))]
    series: Word = ""

    def signed_by(self, signer: Signer, files: dict[str, str]) -> tuple[Manifest, bytes]:
        """With the digests of its files, and the signature of all that."""
        whole = replace(self, signer=signer.public, files=files)
        return whole, signer.sign(whole.text())

    def is_signed(self, signature: bytes) -> bool:
        return is_signed(self.text(), signature, self.signer)

    def text(self) -> bytes:
        """What is signed."""
        return b"crypten-llm tape " + json.dumps(plain(self), sort_keys=True, separators=(",", ":")).encode()


def make_manifest(engine: dict, config: dict, verb: str, plan: dict, requests: int, series: str = "") -> Manifest:
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
        signer="",
        files={},
        series=series,
    )


def fingerprint(config: dict) -> str:
    """Of what decides in a model's public configuration what is dealt."""
    architecture = {name: value for name, value in config.items() if name not in _NOT_IN_A_FINGERPRINT}
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()[:16]


def command(verb: str, plan: dict) -> str:
    """The command that deals a tape for ``plan``."""
    first = "--bench" if verb == "bench" else "--model MODEL"
    given = {name: value for name, value in plan.items() if name not in _NOT_IN_A_TAPE and value not in _USUAL}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join(["python -m crypten_llm deal", first, *options, "--out DIR"])
