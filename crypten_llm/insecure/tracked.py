"""What an eviction policy computes on shares, held against ``plain`` with the error that ``wire`` declares.

INSECURE by purpose: everything is opened to the client's role. Owns ``Tracked``, a handle that carries beside its
shares what ``plain`` makes of the same queries, keys and values, and how far ``wire`` may be from it: each operation's
own bound (``wire_bounds``) and what becomes of its inputs'. So the bound of a score is the declared error of that
score, however a policy came by it, and a choice that differs is a tie or a mistake.

After a choice both go on with that of ``wire``; and each layer's queries, keys and values are taken from ``wire`` as
they are.
"""

import math
from dataclasses import dataclass, replace

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire import bounds
from crypten_llm.engines.wire.handles import Reshaped, Scaled, Weights
from crypten_llm.engines.wire.numbers import bits_for
from crypten_llm.engines.wire.rows import Rows
from crypten_llm.insecure.finding import Finding, worst
from crypten_llm.insecure.opened import OpenedEngine
from crypten_llm.protocols.opening import Opening, Secret
from eviction.operations import Choice

HANDLES = (Secret, Scaled, Reshaped)


class Tracked:
    """secret: the handle of ``wire``. value: what ``plain`` makes of it, float64; error: |secret - value| is at most
    this, element by element. The last two are ``None`` at roles that see nothing."""

    __slots__ = ("secret", "value", "error", "unheld")

    def __init__(self, secret, value=None, error=None, unheld: str = ""):
        """unheld: the operation that made it, while nobody has looked how close to ``plain`` it came."""
        self.secret, self.value, self.error, self.unheld = secret, value, error, unheld

    @property
    def shape(self):
        return self.secret.shape

    def _view(self, change) -> "Tracked":
        value, error = (None if part is None else change(part) for part in (self.value, self.error))
        return Tracked(change(self.secret), value, error)

    def reshape(self, *shape):
        return self._view(lambda part: part.reshape(*shape))

    def permute(self, *order):
        return self._view(lambda part: part.permute(*order))

    def transpose(self, first, second):
        return self._view(lambda part: part.transpose(first, second))

    def __getitem__(self, index):
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


class TrackedSelection:
    """Mixed into an ``OpenedEngine``. ``findings`` and ``chosen``, at the client: every operation of the policy, and of
    attention on the rows that it left, in order; every choice."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.findings: list[Finding] = []
        self.chosen: list[Chosen] = []
        self._plain = PlainEngine()
        self._is_inside = False

    # How an operation runs.

    def see(self, x):
        seen = self._inside([], super().see, x.secret if isinstance(x, Tracked) else x)
        if seen is not None and isinstance(x, Tracked) and isinstance(x.secret, Weights):
            seen = seen / seen.sum(-1, keepdim=True)
        return seen

    def _run(self, name: str, *arguments):
        """The operation ``name`` of ``wire``, and beside it of ``plain`` with its error, if the policy asked for it."""
        operation = getattr(super(), name)
        if self._is_inside:
            return operation(*arguments)
        given = [self._given(argument) for argument in arguments]
        tracked = [handle for argument in given for handle in _handles(argument)]
        out = self._inside(tracked, operation, *(_part(argument, "secret") for argument in given))
        made = Tracked(out, unheld=name)
        for handle in tracked:
            self._hold(handle)
        if self.is_shown:
            made.value = getattr(self._plain, name)(*(_doubled(_part(argument, "value")) for argument in given))
            made.error = getattr(self, f"_error_of_{name}")(made, *given)
        self._hold(made, self._outside(name, given, made))
        return made

    def _inside(self, tracked: list[Tracked], operation, *arguments):
        """Runs what calls operations of ``wire`` itself. A handle whose ring was too small is rounded (``_roomy``)."""
        scales = [getattr(handle.secret, "scale", 0) for handle in tracked]
        before, self._is_inside = self._is_inside, True
        out = operation(*arguments)
        self._is_inside = before
        for handle, scale in zip(tracked, scales, strict=True):
            if getattr(handle.secret, "scale", 0) < scale and handle.error is not None:
                handle.error = handle.error + 2.0**-handle.secret.scale
        return out

    def _given(self, argument):
        """What came from outside the policy is exact: both engines go on from what ``wire`` has."""
        if isinstance(argument, list):
            return [self._given(part) for part in argument]
        if isinstance(argument, HANDLES):
            secret = self._value(argument)
            value = self.see(secret)
            return Tracked(secret, value, None if value is None else torch.zeros_like(value))
        return argument

    def _hold(self, made: Tracked, outside: str = "") -> None:
        """Whether ``wire`` is as close to ``plain`` as was declared. Rows that wait to be opened wait for this too."""
        if not made.unheld or (isinstance(made.secret, Rows) and made.secret.pending is not None):
            return
        name, made.unheld = made.unheld, ""
        seen = self.see(made)
        if self.is_shown:
            self.findings.append(worst(self.meter.where, name, seen, made.value, made.error, outside))

    def _outside(self, name: str, given: list, made: Tracked) -> str:
        """What has left the domain of an operation, at the client."""
        if name not in ("softmax", "mix", "sigmoid") or not self.is_shown:
            return ""
        if name != "softmax":
            return bounds.outside(self.config, name, (made if name == "mix" else given[0]).value)
        scores, mask = given[0].value, given[1]
        rows = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        seen = scores if mask is None else scores[mask.expand_as(scores)]
        found = bounds.outside(self.config, name, seen)
        return found or bounds.outside(self.config, "softmax of a row", rows.logsumexp(-1))

    # Choices: both go on with that of ``wire``.

    def _choose(self, name: str, x, argument):
        operation = getattr(super(), name)
        if self._is_inside:
            return operation(x, argument)
        x = self._given(x)
        opening = self._inside([x], self._comparison, x.secret, name)
        unit = _dropped(opening)
        out = self._inside([x], operation, x.secret, argument)
        made = Tracked(out, self.see(out))
        if self.is_shown:
            made.value, made.error = made.value.round(), torch.zeros_like(made.value)
            own = getattr(self._plain, name)(x.value, argument)
            taken, others = (found.sum(-2) if name == "best" else found for found in (own, made.value))
            gap, declared = _past(x, taken, others, argument) if name == "above" else _places(x, taken, others)
            self._note_choice(name, int(taken.sum()), int((taken * others).sum()), gap, declared, 2 * unit)
        return made

    def _note_choice(self, name: str, taken: int, agreed: int, gap, declared, units: float) -> None:
        """gap: by how much ``plain`` prefers what it took to what ``wire`` took, one for each index that differs;
        declared: the error of both. units: two of the comparison's: an opened value is less than one off.
        """
        where, slack = self.meter.where, declared + units + bounds.FLOAT
        beyond = int((gap > slack).sum())
        margin, excess = ((gap / slack).max().item(), (gap - declared).max().item()) if len(gap) else (0.0, 0.0)
        self.chosen.append(Chosen(where, name, taken, agreed, len(gap) - beyond, beyond, margin))
        self.findings.append(Finding(where, name, max(0.0, excess), units + bounds.FLOAT))

    def top(self, x, count):
        return self._choose("top", x, count)

    def best(self, x, count):
        return self._choose("best", x, count)

    def above(self, x, threshold):
        return self._choose("above", x, threshold)

    # The model's part of attention goes on with the shares.

    def linear(self, x, weight, bias=None):
        return super().linear(x.secret if isinstance(x, Tracked) else x, weight, bias)

    # Operations: the name of one of ``wire``, and its error.

    def public(self, value):
        if self._is_inside:
            return super().public(value)
        made = Tracked(super().public(value))
        if self.is_shown:
            made.value = value.double()
            made.error = _rounding(made.value, made.secret.scale)
        return made

    def add(self, x, y):
        return self._run("add", x, y)

    def _error_of_add(self, out, x, y):
        return x.error + y.error

    def cat(self, handles, dim):
        if not any(isinstance(handle, Tracked) for handle in handles):
            return super().cat(handles, dim)
        return self._run("cat", handles, dim)

    def _error_of_cat(self, out, handles, dim):
        return torch.cat([handle.error for handle in handles], dim)

    def scale(self, x, factor):
        return self._run("scale", x, factor)

    def _error_of_scale(self, out, x, factor):
        factor = torch.as_tensor(factor, dtype=torch.float64)
        return factor.abs() * x.error + (x.value.abs() + x.error) * _rounding(factor, _gained(out, x))

    def total(self, x, dim):
        return self._run("total", x, dim)

    def _error_of_total(self, out, x, dim):
        return x.error.sum(dim)

    def transform(self, x, matrix):
        return self._run("transform", x, matrix)

    def _error_of_transform(self, out, x, matrix):
        matrix = matrix.double()
        return x.error @ matrix.abs() + (x.value.abs() + x.error) @ _rounding(matrix, _gained(out, x))

    def within(self, x, limit):
        return self._run("within", x, limit)

    def _error_of_within(self, out, x, limit):
        return x.error

    def rows(self, x, values=False):
        return self._run("rows", x, values)

    def _error_of_rows(self, out, x, values=False):
        scale = self.config.value if values else self.config.key
        return x.error + (2.0**-scale if x.secret.scale > scale else 0.0)

    def fixed(self, x, values=False):
        return self._run("fixed", x, values)

    _error_of_fixed = _error_of_rows

    def contents(self, rows):
        return self._run("contents", rows)

    def _error_of_contents(self, out, rows):
        return rows.error

    def take(self, rows, index):
        return self._run("take", rows, index)

    def _error_of_take(self, out, rows, index):
        return self._plain.take(rows.error, index)

    def keep(self, rows, picks):
        return self._run("keep", rows, picks)

    def _error_of_keep(self, out, rows, picks):
        return self._plain.keep(rows.error, picks.value)

    def drop(self, rows, hot):
        return self._run("drop", rows, hot)

    def _error_of_drop(self, out, rows, hot):
        return self._plain.drop(rows.error, hot.value)

    def coarse(self, rows, bits):
        return self._run("coarse", rows, bits)

    def _error_of_coarse(self, out, rows, bits):
        """A level more or less next to a limit between two."""
        opening = self._inside([], self._comparison, self._inside([], self.contents, rows.secret), "coarse")
        near = rows.error + _dropped(opening)
        low, high = (self._plain.coarse(rows.value + side * near, bits) for side in (-1, 1))
        most, scale = 2 ** (bits - 1) - 1, self.config.value if rows.secret.values else self.config.key
        return torch.maximum(high - out.value, out.value - low) + most * 2.0**-17 + 2.0**-scale

    def scores(self, query, keys):
        return self._run("scores", query, keys)

    def _error_of_scores(self, out, query, keys):
        far = keys.value.abs() + keys.error
        unit = 2.0**-self.config.activation if query.secret.scale > self.config.activation else 0.0
        return query.value.abs() @ keys.error.transpose(1, 2) + (query.error + unit) @ far.transpose(1, 2)

    def gather_scores(self, choice, scores):
        return self._run("gather_scores", choice, scores)

    def _error_of_gather_scores(self, out, choice, scores):
        return self._plain.gather_scores(_part(choice, "value"), scores.error)

    def softmax(self, scores, mask=None):
        return self._run("softmax", scores, mask)

    def _error_of_softmax(self, out, scores, mask=None):
        """A score's error multiplies its weight, and the largest of a row divides all of them."""
        visible, errors = scores.value, scores.error
        if mask is not None:
            visible, errors = visible.masked_fill(~mask, -math.inf), errors.masked_fill(~mask, 0.0)
        turned = out.value * (errors + errors.amax(-1, keepdim=True)).expm1()
        total = (visible - errors - self.config.score_limit).exp().sum(-1, keepdim=True)
        own = bounds.softmax(self.config, out.value + turned, total)
        return turned + (own if mask is None else own.masked_fill(~mask, 0.0))

    def scatter_weights(self, choice, weights, count):
        return self._run("scatter_weights", choice, weights, count)

    def _error_of_scatter_weights(self, out, choice, weights, count):
        choice, attended = _part(choice, "value"), weights.shape[-1]
        own = 0.0 if choice.picks is None else bounds.scattered(weights.value + weights.error, attended)
        return self._plain.scatter_weights(choice, weights.error + own, count)

    def mix(self, weights, values):
        return self._run("mix", weights, values)

    def _error_of_mix(self, out, weights, values):
        sums = torch.tensor([[0.25], [1.0]], dtype=torch.float64)  # what a row's weights may add up to
        own = bounds.mix(self.config, sums, out.value)
        return own + weights.error @ (values.value.abs() + values.error) + weights.value @ values.error

    def mass(self, weights, queries):
        return self._run("mass", weights, queries)

    def _error_of_mass(self, out, weights, queries):
        queries, wire = queries.double(), weights.secret.wires[0]
        kept = wire.width - wire.scale - bits_for(queries.abs().sum().item()) - 2
        drawn = torch.einsum("gmn,m->gn", weights.error, queries.abs())
        return drawn + bounds.mass(weights.value + weights.error, queries, kept, out.secret.scale)

    def picks(self, bits, count):
        return self._run("picks", bits, count)

    def _error_of_picks(self, out, bits, count):
        return torch.zeros_like(out.value)

    def gather(self, picks, x):
        return self._run("gather", picks, x)

    def _error_of_gather(self, out, picks, x):
        return picks.value @ x.error

    def largest(self, x, dim):
        return self._run("largest", x, dim)

    def _error_of_largest(self, out, x, dim):
        return x.error.amax(dim) + (2.0**-out.secret.scale if out.secret.scale < x.secret.scale else 0.0)

    def multiply(self, x, y):
        return self._run("multiply", x, y)

    def _error_of_multiply(self, out, x, y):
        units = (2.0**-self.config.activation if side.secret.scale > self.config.activation else 0.0 for side in (x, y))
        one, other = (side.error + unit for side, unit in zip((x, y), units, strict=True))
        return x.value.abs() * other + y.value.abs() * one + one * other

    def choose(self, bits, x, y):
        return self._run("choose", bits, x, y)

    def _error_of_choose(self, out, bits, x, y):
        return self._plain.choose(bits.value, x.error, y.error)

    def sigmoid(self, x):
        return self._run("sigmoid", x)

    def _error_of_sigmoid(self, out, x):
        return x.error / 4 + bounds.sigmoid()

    def reciprocal(self, x, low, high):
        return self._run("reciprocal", x, low, high)

    def _error_of_reciprocal(self, out, x, low, high):
        least = (x.value - x.error).clamp_min(low / 2)
        return x.error / (least * x.value.clamp(low, high)) + bounds.reciprocal(self.config, 1 / least)


class TrackedEngine(TrackedSelection, OpenedEngine):
    """Holds a policy against ``plain``, and nothing else."""

    name = "wire, held against plain"


def _handles(argument) -> list[Tracked]:
    if isinstance(argument, Choice):
        argument = argument.picks
    if isinstance(argument, list):
        return [part for part in argument if isinstance(part, Tracked)]
    return [argument] if isinstance(argument, Tracked) else []


def _part(argument, name: str):
    """An argument with ``secret`` or ``value`` in the place of what is tracked."""
    if isinstance(argument, Choice):
        return argument if argument.picks is None else replace(argument, picks=getattr(argument.picks, name))
    if isinstance(argument, list):
        return [_part(part, name) for part in argument]
    return getattr(argument, name) if isinstance(argument, Tracked) else argument


def _doubled(argument):
    is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if is_float else argument


def _dropped(opening: Opening) -> float:
    """How far an opened value may be from what was opened: less than a unit, where bits are dropped."""
    return 2.0 ** (opening.truncate - opening.secret.scale) if opening.truncate else 0.0


def _rounding(value: torch.Tensor, bits: int) -> torch.Tensor:
    """How far float64 numbers are from multiples of 2^-bits."""
    return (value - (value * 2.0**bits).round() / 2.0**bits).abs()


def _gained(out: Tracked, x: Tracked) -> int:
    """Fractional bits of the public factor."""
    return out.secret.scale - x.secret.scale


def _places(x: Tracked, taken, others):
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
    return (torch.stack(found) if found else torch.zeros(0) for found in (gaps, errors))


def _past(x: Tracked, taken, others, threshold: float):
    """For each index that only one of both took: how far its value is from the threshold, and its declared error."""
    differs = taken != others
    return (x.value[differs] - threshold).abs(), x.error[differs]
