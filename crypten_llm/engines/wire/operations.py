"""The table of engine ``wire``'s operations.

Owns ``OPERATIONS``. Each operation stands once, in the file of its topic (``layers``, ``attention``, ``arithmetic``,
``choosing``, ``gathering``, ``keeping``), and says beside its protocol what is declared of it:

- *protocol*: a generator (``protocols.rounds.Protocol``), or a plain function where nothing is ever opened; its first
  argument is the engine. Its docstring gives Error and Cost; what is revealed is alike for all: openings behind fresh
  masks that are uniform over their ring, to both parties, whose number and sizes follow from shapes, counts and
  settings.
- *plaintext twin*: the operation of the same name of engine ``plain``.
- *bound*: how far the result may be from the twin's on the same inputs, element by element, as a function of the
  engine, the result and the arguments; handles come as ``insecure.tracked.Tracked``: what the shares stand for, and its
  error.
- *domain*: what is limited, from where to where; beyond, the result is wrong (``engine.domains`` says what notices).

``WireEngine`` has a method for each, and the comparing engines (``insecure``) hold each against its twin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from eviction.operations import Choice


Made = TypeVar("Made", bound=Callable)  # a protocol


@dataclass(frozen=True)
class Domain:
    """what: is limited, in words; low, high: by the engine's configuration."""

    what: str
    low: Callable
    high: Callable


@dataclass(frozen=True)
class Operation:
    protocol: Callable
    bound: Callable | None
    domains: dict[str, Domain]

    @property
    def is_local(self) -> bool:
        """Whether nothing is ever opened."""
        return not inspect.isgeneratorfunction(self.protocol)


OPERATIONS: dict[str, Operation] = {}


def operation(bound: Callable | None = None, **domains: Domain) -> Callable[[Made], Made]:
    """Enters a protocol into the table under its name. domains: by name, ``domain`` for the only one."""

    def enter(protocol: Made) -> Made:
        OPERATIONS[protocol.__name__] = Operation(protocol, bound, domains)
        return protocol

    return enter


def bound_of(name: str) -> Callable:
    """What is declared of an operation's error."""
    bound = OPERATIONS[name].bound
    assert bound is not None, f"{name} declares its error elsewhere"
    return bound


def unit(bits: int) -> float:
    """The unit of a scale."""
    return 2.0**-bits


def valued(choice: Choice) -> Choice:
    """A choice whose picks are tracked, with the values that they stand for."""
    return choice if choice.picks is None else replace(choice, picks=choice.picks.value)
