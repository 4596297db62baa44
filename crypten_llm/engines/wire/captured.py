"""A step of engine ``wire`` that is the same again and again, on a device that captures it.

Owns what of the engine goes from one step to the next beside the program's own inputs: the words in which flags and
sketches are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.handles import OneHot
from crypten_llm.kernels import graphs
from crypten_llm.protocols.dealer.captured import Captured
from crypten_llm.protocols.flags import Gathered
from crypten_llm.protocols.secret import Secret

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine

Input = Secret | OneHot | torch.Tensor | None  # tensors are public, and on the engine's device


class Repeated:
    """A program of sections that are alike, to be called once in each, right behind its begin.

    What the first call is given stays; each other call puts what it is given in its place. What a call returns is gone
    with the next one. The first call is measured, the second is captured, and those that follow launch what it
    launched (``protocols.dealer.captured``). Messages and material are those of the program, so
    parties need not agree on it.
    """

    def __init__(self, engine: WireEngine, program: Callable[..., Secret]) -> None:
        self._engine, self._program = engine, program
        self._captured = Captured(engine.runtime, graphs.Graphs(engine.runtime.device))
        self._inputs: tuple[Input, ...] | None = None
        self._none: list[torch.Tensor] = []  # the gathered words that captured kernels begin with, and end with
        self._noted: list[torch.Tensor] = []
        self._result: Secret | None = None

    def __call__(self, *inputs: Input) -> Secret:
        if self._inputs is None:
            self._inputs = tuple(map(_again, inputs))
            return self._captured.measure(partial(self._program, *inputs))
        for place, new in zip(self._inputs, inputs, strict=True):
            _put(place, new)
        gathered: tuple[Gathered, ...] = self._engine.checks, self._engine.sketches
        before = [words.take() for words in gathered]
        if self._result is None:
            self._none = [words.current for words in gathered]
            self._result = self._captured.capture(self._run)
            self._noted = [words.take() for words in gathered]
        else:
            self._captured.replay()
        for words, earlier, noted in zip(gathered, before, self._noted, strict=True):
            words.join(earlier ^ noted)
        return self._result

    def _run(self) -> Secret:
        assert self._inputs is not None, "a program is captured when it has been called before"
        result = self._program(*map(_again, self._inputs))
        assert not self._engine.rounds.is_busy, "what a step opens, it opens in rounds of its own"
        return result


def _again(given: Input) -> Input:
    """The same once more, for a program that may move its input to another ring (``Secret.become``)."""
    return given.like(given.share) if isinstance(given, Secret) else given


def _put(place: Input, new: Input) -> None:
    """Writes an input over the one in whose place it comes; shapes, which the dealer has, are the same."""
    if isinstance(place, torch.Tensor) and isinstance(new, torch.Tensor):
        place.copy_(new)
    elif isinstance(place, OneHot) and isinstance(new, OneHot):
        _put(place.bits, new.bits)
    elif isinstance(place, Secret) and isinstance(new, Secret):
        _put(place.share, new.share)
