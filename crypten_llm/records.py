"""What comes from another party or a file, read once into a type that says what it may be.

Owns the one validator: ``msgspec`` parses JSON straight into dataclasses and structures, with bounds in their
annotations, and never into anything else. NaN, text that is not UTF-8 and JSON nested so deeply that reading it would
exhaust the stack are refused like any other wrong value.

Whoever reads says whose fault that is: ``links.transport`` of a message, ``files`` of a file.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec

from crypten_llm import limits
from crypten_llm.errors import CryptenLLMError, one_line

Kind = TypeVar("Kind")

Count = Annotated[int, msgspec.Meta(ge=0, le=limits.COUNT)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=limits.TOKENS)]
_ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"  # which cannot steer a terminal
Word = Annotated[str, msgspec.Meta(max_length=100, pattern=_ONE_LINE)]
Words = Annotated[str, msgspec.Meta(max_length=4000, pattern=_ONE_LINE)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256, in hex


class Malformed(ValueError):
    """The text is no JSON of the kind that is due; the message says in one line where and why."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A JSON object of exactly these fields; those with defaults may be missing."""


class Extract(msgspec.Struct, frozen=True):
    """Of a JSON object that others have written, the fields that are read here; it may have more."""


def decode(data: bytes | bytearray | str, kind: Any) -> Any:
    """The value of ``kind`` that this JSON text is. Raises Malformed."""
    return _checked(_decoder(kind).decode, data)


def convert(value: Any, kind: type[Kind]) -> Kind:
    """The same of what has been parsed already: dicts, lists, numbers, texts. Raises Malformed."""
    return _checked(lambda given: msgspec.convert(given, kind), value)


def encode(value: object) -> bytes:
    """The JSON text of a record, a dataclass, or what JSON knows."""
    return msgspec.json.encode(value)


def in_order(value: object) -> Any:
    """A record, or what JSON knows, with the names of all objects sorted: of equal values the same text."""
    return msgspec.to_builtins(value, order="sorted")


def plain(value: object) -> Any:
    """A record as dicts, lists, numbers and texts."""
    return msgspec.to_builtins(value)


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder:
    return msgspec.json.Decoder(kind)


def _checked(read: Any, given: Any) -> Any:
    try:
        return read(given)
    except RecursionError:
        raise Malformed("not valid JSON: nested too deeply") from None
    except (msgspec.ValidationError, CryptenLLMError) as error:  # the second from a record's own checks
        raise Malformed(f"not of its kind: {one_line(str(error))}") from None
    except (msgspec.MsgspecError, UnicodeError, OverflowError) as error:
        raise Malformed(f"not valid JSON: {one_line(str(error))}") from None
