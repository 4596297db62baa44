"""Reading a receipt afterwards: what of it holds, one line each.

Owns the checks. Whoever has the parties' certificates can make them, without a party and without a model.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crypten_llm import files
from crypten_llm.errors import UsageError
from crypten_llm.session.receipt import Part, Receipt, Receipts, Signed, broken_links, disagreements
from crypten_llm.units import size

LARGEST = 64 << 20  # bytes of a file of receipts


@dataclass(frozen=True)
class Finding:
    """holds: whether what is said here is as it has to be."""

    what: str
    holds: bool
    words: str


def read(path: str | Path) -> Receipts:
    """Raises UsageError for a file that is none of receipts."""
    found: Receipts = files.read_json(path, Receipts, LARGEST)
    return found


def check(receipt: Receipt, keys: str = "") -> Iterator[Finding]:
    """keys: folder with the certificates of all parties, without which no signature says whose it is.

    Raises UsageError for a certificate that cannot be read.
    """
    parts = [each.part for each in receipt.parts]
    yield _parties(parts)
    for signed in receipt.parts:
        yield _signature(signed, keys)
    yield _links(parts)
    differ = disagreements(parts)
    told = f"not the same at all: {', '.join(differ)}" if differ else "the same at all: " + _facts(parts[0])
    yield Finding("facts", not differ, told)


def _parties(parts: list[Part]) -> Finding:
    named = {role for part in parts for role in part.parties}
    there = [part.role for part in parts]
    missing = [role for role in sorted(named) if role not in there]
    more = [role for role in there if role not in named or there.count(role) > 1]
    words = f"a part of each is here: {', '.join(there)}"
    if missing or more:
        words = f"without a part of {missing[0]}" if missing else f"a part of {more[0]} too many"
    return Finding("parties", not (missing or more), words)


def _signature(signed: Signed, keys: str) -> Finding:
    role, made = signed.part.role, signed.part.made
    if signed.key is None or signed.signature is None:
        return Finding(f"signature of {role}", False, "unsigned, so anybody may have written it: links without --tls")
    from crypten_llm.links.signatures import fingerprint, is_signed, public_keys

    try:
        signature = base64.b64decode(signed.signature, validate=True)
    except (binascii.Error, ValueError):
        signature = b""
    if not is_signed(signed.part.text(), signature, signed.key):
        return Finding(f"signature of {role}", False, "does not fit: the receipt was changed after it was signed")
    if not keys:
        words = f"by the key {fingerprint(signed.key)}; whose that is its certificate says: --keys DIR"
        return Finding(f"signature of {role}", False, words)
    if signed.key not in public_keys(keys, role):
        words = f"by the key {fingerprint(signed.key)}, which is not that of {role}'s certificate in {keys}"
        return Finding(f"signature of {role}", False, words)
    return Finding(f"signature of {role}", True, f"by the key of its certificate, at {made} by its clock")


def _links(parts: list[Part]) -> Finding:
    broken = list(broken_links(parts))
    if broken:
        sender, receiver = broken[0]
        words = f"what {sender} says it sent to {receiver} is not what {receiver} says it received"
        return Finding("messages", False, words)
    backwards = [part.role for part in parts if not _goes_on(part)]
    if backwards:
        return Finding("messages", False, f"{backwards[0]} says that fewer had passed afterwards than before")
    spans = [passed.sent for part in parts for passed in part.links.values()]
    frames, sent = (sum(getattr(s.after, name) - getattr(s.before, name) for s in spans) for name in _COUNTS)
    return Finding("messages", len(parts) > 1, f"{frames:,} with {size(sent)}, the same at both ends of every link")


_COUNTS = ("frames", "bytes")


def _goes_on(part: Part) -> bool:
    spans = [span for passed in part.links.values() for span in (passed.sent, passed.received)]
    return all(getattr(span.before, name) <= getattr(span.after, name) for span in spans for name in _COUNTS)


def _facts(part: Part) -> str:
    policies = ", ".join(dict.fromkeys(str(plan.get("policy")) for plan in part.plans))
    weights = f"program {part.program[:16]}, model {part.model.config[:16]}"
    return f"engine {part.settings.engine}, {weights}, policy {policies}, {len(part.revealed)} lines of the ledger"


def check_weights(receipt: Receipt, model: str, keys: str = "", opening: str = "") -> Finding:
    """Whether the owner's commitment is to the weights of ``model``, a folder or a GGUF file.

    opening: 64 hex digits as the owner tells them; not given, they are made with the owner's key in ``keys``.
    Raises UsageError for what cannot be read.
    """
    from crypten_llm.links.signatures import Signer
    from crypten_llm.models import checkpoint
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.notary import Weighing, commitment, opening_of

    told = [part.model.weights for part in (each.part for each in receipt.parts) if part.role == "owner"]
    if not (opening or keys):
        raise UsageError("--model is compared by the owner with its key (--keys), or with the --opening that it tells")
    weighing = Weighing()
    for name, value in checkpoint.load_weights(model, LlamaConfig.from_folder(model)):
        weighing.add(name, value)
    weights = weighing.digest()
    try:
        used = bytes.fromhex(opening) if opening else opening_of(Signer.of_role(keys, "owner"), weights)
    except ValueError:
        raise UsageError(f"--opening is {opening[:80]!r}; it must be hex digits, as the owner tells them") from None
    if told != [commitment(used, weights)]:
        return Finding("weights", False, f"the owner's commitment is not to those of {model}, by this key or opening")
    return Finding("weights", True, f"those of {model}; opening, to be told to whom may know: {used.hex()}")
