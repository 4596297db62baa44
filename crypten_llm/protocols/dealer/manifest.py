"""What a tape is for, and how its files are laid out: what the dealer writes and the party reads alike.

A tape is a folder: ``owner.tape`` and ``client.tape``, each for that party alone, and ``manifest.json``, which is
public. A party's file holds MAGIC, the length of its header (8 bytes), the header (JSON: the manifest, and offset, size
and CRC-32 of each section), the party's key, and the material in the order in which the program asks for it, every
piece padded to whole words. Owns the manifest and this layout; ``recording`` writes it, ``tape`` reads it.
"""

import hashlib
import json
import os
import struct
from functools import cache
from pathlib import Path

import crypten_llm
import eviction
from crypten_llm.protocols.dealer.randomness import fresh_key
from crypten_llm.roles import CLIENT, OWNER, role_names

FORMAT = 1
PARTIES = (OWNER, CLIENT)
NAMES = role_names(len(PARTIES))[: len(PARTIES)]
MAGIC = b"crypten-llm tape"
LENGTH = struct.Struct("<Q")
WORD = 8
_PROGRAM = ("*.py", "*.json", "weights/*.safetensors")  # the last are of trained policies
_NOT_IN_A_TAPE = ("hide_length",)  # changes nothing that is dealt
_USUAL = (0, "logits")  # what no option needs to say
_NOT_IN_A_FINGERPRINT = ("bos_token_id", "eos_token_id")  # as little; generation_config.json may change them


def make_manifest(engine: dict, config: dict, verb: str, plan: dict, requests: int) -> dict:
    """What a tape is for: public, and what must be alike on all sides.

    engine: the engine's settings. config: the model's config.json. verb, plan: the request, as the client announces it.
    """
    return {
        "format": FORMAT,
        "version": crypten_llm.__version__,
        "program": program(),
        "engine": engine,
        "config": fingerprint(config),
        "verb": verb,
        "plan": {name: value for name, value in plan.items() if name not in _NOT_IN_A_TAPE},
        "requests": requests,
        "id": fresh_key()[:8].hex(),
    }


@cache
def program() -> str:
    """Fingerprint of the code: material means something only to the program that it was dealt for, line by line."""
    code = hashlib.sha256()
    for package in (Path(crypten_llm.__file__).parent, Path(eviction.__file__).parent):
        for path in sorted(path for kind in _PROGRAM for path in package.rglob(kind)):
            code.update(f"{path.relative_to(package.parent)}\n".encode() + path.read_bytes())
    return code.hexdigest()[:16]


def fingerprint(config: dict) -> str:
    """Of what decides in a model's public configuration what is dealt."""
    architecture = {name: value for name, value in config.items() if name not in _NOT_IN_A_FINGERPRINT}
    return checksum(json.dumps(architecture, sort_keys=True).encode())


def command(verb: str, plan: dict) -> str:
    """The command that deals a tape for ``plan``."""
    first = "--bench" if verb == "bench" else "--model MODEL"
    given = {name: value for name, value in plan.items() if name not in _NOT_IN_A_TAPE and value not in _USUAL}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join(["python -m crypten_llm deal", first, *options, "--out DIR"])


def padded(count: int) -> int:
    """Bytes that a piece of ``count`` takes in a file."""
    return -(-count // WORD) * WORD


def before_key(header: dict) -> bytes:
    """The start of a file: all that stands before its key."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return MAGIC + LENGTH.pack(len(text)) + text


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def sync(folder: Path) -> None:
    """Returns when the disk knows the names in ``folder``."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
