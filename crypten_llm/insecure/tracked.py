"""Every operation of ``wire`` on shares, held against ``plain`` with the error that is declared of it.

INSECURE by purpose: everything is opened to the client's role. Owns ``Tracked``, a handle that carries beside its
shares what ``plain`` makes of the same queries, keys and values, and how far ``wire`` may be from it: each operation's
own bound (``engines.wire.operations``) and what becomes of its inputs'. So the bound of a score is the declared error
of that score, however a policy came by it, and a choice that differs is a tie or a mistake.

After a choice both go on with that of ``wire``; and each layer's queries, keys and values are taken from ``wire`` as
they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire import choosing
from crypten_llm.engines.wire.handles import Rows, Weights
from crypten_llm.engines.wire.keeping import dropped
from crypten_llm.engines.wire.operations import OPERATIONS, bound_of
from crypten_llm.insecure.finding import FLOAT, Finding, outside, worst
from crypten_llm.insecure.opened import OpenedEngine
from crypten_llm.protocols.secret import Secret
from eviction.operations import Choice

if TYPE_CHECKING:
    from eviction.operations import Handle


LAYERS = ("embed", "linear", "rms_norm", "rotate", "swiglu", "residual")  # of the model, which goes on with the shares
CHOICES = ("top", "best", "above")
MODULAR = ("scores", "rows", "softmax", "gather_scores")  # which read numbers modulo a ring, however large they are


class Tracked:
    """secret: the handle of ``wire``. value: what ``plain`` makes of it, float64; error: |secret - value| is at most
    this, element by element. The last two are ``None`` at roles that see nothing."""

    __slots__ = ("secret", "value", "error", "unheld")

    def __init__(self, secret: Handle, value: Any = None, error: Any = None, unheld: str = "") -> None:
        """unheld: the operation that made it, while nobody has looked how close to ``plain`` it came."""
        self.secret, self.unheld = secret, unheld
        self.value: torch.Tensor = value
        self.error: torch.Tensor = error

    @property
    def shape(self) -> torch.Size:
        return self.secret.shape

    def _view(self, change: Callable[[Any], Any]) -> Tracked:
        value, error = (None if part is None else change(part) for part in (self.value, self.error))
        return Tracked(change(self.secret), value, error)

    def reshape(self, *shape: int) -> Tracked:
        return self._view(lambda part: part.reshape(*shape))

    def permute(self, *order: int) -> Tracked:
        return self._view(lambda part: part.permute(*order))

    def transpose(self, first: int, second: int) -> Tracked:
        return self._view(lambda part: part.transpose(first, second))

    def __getitem__(self, index: Any) -> Tracked:
        return self._view(lambda part: part[index])


@dataclass(frozen=True)
class Chosen:
    """One call of ``top``, ``best`` or ``above``, on the same inputs: taken: by ``plain``; agreed: by both. ties: taken
    by ``plain`` alone though within the declared error of what ``wire`` took instead; beyond: by more than that.
    margin: how much of the declared error the largest difference needed.
    """

    where: str
    operation: str
    taken: int
    agreed: int
    ties: int
    beyond: int
    margin: float


class TrackedEngine(OpenedEngine):
    """Holds a policy against ``plain``, and attention on the rows that it left. ``findings`` and ``chosen``, at the
    client: every operation in order; every choice. twin: ``plain``.
    """

    name = "wire, held against plain"
    tells_range = False  # what leaves its range is found where it does

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.findings: list[Finding] = []
        self.chosen: list[Chosen] = []
        self.twin = PlainEngine(softmax_base=self.softmax_base)

    # How an operation runs.

    def see(self, x: Handle) -> torch.Tensor | None:
        seen = super().see(x.secret if isinstance(x, Tracked) else x)
        if seen is not None and isinstance(x, Tracked) and isinstance(x.secret, Weights):
            seen = seen / seen.sum(-1, keepdim=True)
        return seen

    def follow(self, name: str, *arguments: Any) -> Tracked:
        """The operation ``name`` of ``wire``, and beside it of ``plain`` with its error."""
        given = [self.given(argument) for argument in arguments]
        tracked = [handle for argument in given for handle in _handles(argument)]
        left = "" if name in MODULAR else _beyond_declared(tracked)
        made = Tracked(self._run(name, tracked, given), unheld=name)
        for handle in tracked:
            self._hold(handle)
        if self.is_shown:
            made.value = getattr(self.twin, name)(*(doubled(_part(argument, "value")) for argument in given))
            made.error = bound_of(name)(self, made, *given)
        self._hold(made, left or self._outside(name, given, made))
        return made

    def _run(self, name: str, tracked: list[Tracked], given: list) -> Handle:
        """The operation of ``wire`` alone. A handle whose ring was too small is rounded (``handles.roomy``)."""
        scales = [getattr(handle.secret, "scale", 0) for handle in tracked]
        operation, secrets = OPERATIONS[name], [_part(argument, "secret") for argument in given]
        out = operation.protocol(self, *secrets)
        out = out if operation.is_local else self.rounds.run(out)
        for handle, scale in zip(tracked, scales, strict=True):
            if getattr(handle.secret, "scale", 0) < scale and handle.error is not None:
                handle.error = handle.error + 2.0**-handle.secret.scale
        return out

    def given(self, argument: Any) -> Any:
        """What came from outside the policy is exact: both engines go on from what ``wire`` has."""
        if isinstance(argument, list):
            return [self.given(part) for part in argument]
        if isinstance(argument, Secret):
            secret = self.settled(argument)
            value = self.see(secret)
            return Tracked(secret, value, None if value is None else torch.zeros_like(value))
        return argument

    def _hold(self, made: Tracked, left: str = "") -> None:
        """Whether ``wire`` is as close to ``plain`` as was declared. Rows that wait to be opened wait for this too."""
        if not made.unheld or (isinstance(made.secret, Rows) and made.secret.pending is not None):
            return
        name, made.unheld = made.unheld, ""
        seen = self.see(made)
        if self.is_shown:
            self.findings.append(worst(self.meter.where, name, seen, made.value, made.error, left))

    def _outside(self, name: str, given: list, made: Tracked) -> str:
        """What has left the domain of an operation, at the client."""
        if not OPERATIONS[name].domains or not self.is_shown:
            return ""
        if name == "rms_norm":
            x, _, eps, _ = given
            return outside(self.config, name, x.value.square().sum(-1) + eps * x.shape[-1])
        if name != "softmax":
            return self._outside_plain(name, given, made)
        scores, mask = given[0].value * math.log(self.softmax_base), given[1] if len(given) > 1 else None
        rows = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        seen = scores if mask is None else scores[mask.expand_as(scores)]
        return outside(self.config, name, seen) or outside(self.config, "softmax row", rows.logsumexp(-1))

    def _outside_plain(self, name: str, given: list, made: Tracked) -> str:
        if name == "swiglu":
            gate, up = (
                outside(self.config, f"swiglu {which}", x.value)
                for which, x in zip(("gates", "up"), given, strict=False)
            )
            return gate or up
        return outside(self.config, name, (made if name in ("mix", "residual") else given[0]).value)

    # Choices: both go on with that of ``wire``.

    def choose_alike(self, name: str, x: Handle, argument: Any) -> Tracked:
        """``top``, ``best`` or ``above``."""
        x = self.given(x)
        left = _beyond_declared([x])
        unit = dropped(self.rounds.run(choosing.comparison(self, x.secret, name)))
        out = self._run(name, [x], [x, argument])
        made = Tracked(out, self.see(out))
        if self.is_shown:
            made.value, made.error = made.value.round(), torch.zeros_like(made.value)
            own = getattr(self.twin, name)(x.value, argument)
            taken, others = (found.sum(-2) if name == "best" else found for found in (own, made.value))
            gap, declared = _past(x, taken, others, argument) if name == "above" else _places(x, taken, others)
            self._note_choice(name, int(taken.sum()), int((taken * others).sum()), gap, declared, 2 * unit, left)
        return made

    def _note_choice(
        self, name: str, taken: int, agreed: int, gap: torch.Tensor, declared: torch.Tensor, units: float, left: str
    ) -> None:
        """gap: by how much ``plain`` prefers what it took to what ``wire`` took, one for each index that differs;
        declared: the error of both. units: two of the comparison's: an opened value is less than one off. left: what
        has left its domain.
        """
        where, slack = self.meter.where, declared + units + FLOAT
        beyond = int((gap > slack).sum())
        margin, excess = ((gap / slack).max().item(), (gap - declared).max().item()) if len(gap) else (0.0, 0.0)
        self.chosen.append(Chosen(where, name, taken, agreed, len(gap) - beyond, beyond, margin))
        self.findings.append(Finding(where, name, max(0.0, excess), units + FLOAT, left))

    # The model's part of attention goes on with the shares.

    def linear(self, x: Handle, weight: Handle, bias: Handle = None) -> Handle:
        return super().linear(x.secret if isinstance(x, Tracked) else x, weight, bias)

    def scores(self, query: Handle, keys: Handle, mask: torch.Tensor | None = None) -> Handle:
        """Of all entries, so that each can be looked at."""
        return self.follow("scores", query, keys)

    def rows(self, x: Handle, values: bool = False) -> Handle:
        """New rows of the model are what the policy finds; they are followed from here on."""
        return self.follow("rows", x, values)

    def cat(self, handles: Handle, dim: int) -> Handle:
        if any(isinstance(handle, Tracked) for handle in handles):
            return self.follow("cat", handles, dim)
        return super().cat(handles, dim)


def _following(name: str) -> Callable:
    if name in CHOICES:
        return lambda self, x, argument: self.choose_alike(name, x, argument)
    signature = inspect.signature(OPERATIONS[name].protocol)

    def run(self: TrackedEngine, *arguments: Any, **options: Any) -> Tracked:
        return self.follow(name, *signature.bind(self, *arguments, **options).args[1:])

    return run


for _name in OPERATIONS:
    if _name not in (*LAYERS, "cat", "rows", "scores"):
        setattr(TrackedEngine, _name, _following(_name))


def _handles(argument: Any) -> list[Tracked]:
    if isinstance(argument, Choice):
        argument = argument.picks
    if isinstance(argument, list):
        return [part for part in argument if isinstance(part, Tracked)]
    return [argument] if isinstance(argument, Tracked) else []


def _beyond_declared(handles: list[Tracked]) -> str:
    """What of these numbers is larger than was declared of them, which openings and comparisons go by."""
    for handle in handles:
        if isinstance(handle.secret, Secret) and handle.value is not None and handle.value.numel():
            most = handle.value.abs().max().item()
            if most > 2.0**handle.secret.bits:
                return f"numbers up to {most:.3g}, of which no more than 2^{handle.secret.bits} was declared"
    return ""


def _part(argument: Any, name: str) -> Any:
    """An argument with ``secret`` or ``value`` in the place of what is tracked."""
    if isinstance(argument, Choice):
        return argument if argument.picks is None else replace(argument, picks=getattr(argument.picks, name))
    if isinstance(argument, list):
        return [_part(part, name) for part in argument]
    return getattr(argument, name) if isinstance(argument, Tracked) else argument


def doubled(argument: Any) -> Any:
    """An argument for ``plain``: a public tensor of floats as float64, all else as it is."""
    is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if is_float else argument


def _places(x: Tracked, taken: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each index that plain alone took: by how much its value is above that of an index which wire alone took, and
    the declared error of the two; of those indices, the one that is furthest beyond that error."""
    gaps, errors = [], []
    rows = (part.reshape(-1, x.shape[-1]) for part in (x.value, x.error, taken, others))
    for value, error, one, other in zip(*rows, strict=True):
        instead = other > one
        for index in (one > other).nonzero()[:, 0]:
            apart, sums = value[index] - value[instead], error[index] + error[instead]
            furthest = (apart - sums).argmax()
            gaps.append(apart[furthest])
            errors.append(sums[furthest])
    return tuple(torch.stack(found) if found else torch.zeros(0) for found in (gaps, errors))


def _past(x: Tracked, taken: torch.Tensor, others: torch.Tensor, threshold: float) -> tuple[torch.Tensor, ...]:
    """For each index that only one of both took: how far its value is from the threshold, and its declared error."""
    differs = taken != others
    return (x.value[differs] - threshold).abs(), x.error[differs]
