"""What policies do with rows and scores: keep the best, drop the worst, take note of attention.

Owns the index arithmetic that several policies share. Rows stay sorted by position; sinks and recent rows are public.
"""

from collections.abc import Callable

import torch

from eviction.operations import Handle, Layer, Operations


def spread(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """A public weight per new row [T] as a weight per query [M], the mean over the heads of a group."""
    return rows.float().repeat(layer.group) / layer.group


def add_mass(ops: Operations, notes: dict[str, Handle], mass: Handle, limit: float, note: str = "mass") -> None:
    """Adds [G, N] to what ``notes`` have of the same rows; rows that are new begin with what they have.

    limit: no sum is larger in magnitude; of attention, as many as there were queries.
    """
    before = notes.get(note)
    if before is not None:
        old, new = before.shape[-1], mass.shape[-1]
        total = ops.add(before, mass[..., :old])
        mass = total if old == new else ops.cat([total, mass[..., old:]], -1)
    notes[note] = ops.within(mass, limit)


def note_more(ops: Operations, layer: Layer, note: str, more: Handle, dim: int) -> None:
    """Notes ``more`` behind what is noted already, along a dimension."""
    before = layer.notes.get(note)
    layer.notes[note] = more if before is None else ops.cat([before, more], dim)


def pooled(ops: Operations, x: Handle, reach: int, limit: float) -> Handle:
    """Each of [G, N] with the ``reach`` ones on either side, beyond the ends zero: in the order of the averages,
    without their division. limit: of all of a row together, of which each is in a sum but once."""
    rows = x.shape[-1]
    if reach == 0:
        return x
    zeros = ops.public(torch.zeros(x.shape[0], reach))
    padded = ops.cat([zeros, x, zeros], -1)
    total = padded[..., :rows]
    for start in range(1, 2 * reach + 1):
        total = ops.add(total, padded[..., start : start + rows])
    return ops.within(total, limit)


def over_heads(ops: Operations, x: Handle) -> Handle:
    """The mean over kv heads: [G, N] to [1, N]."""
    heads, rows = x.shape
    return x if heads == 1 else ops.scale(ops.total(x, 0).reshape(1, rows), 1 / heads)


def retain(
    ops: Operations,
    layer: Layer,
    scores: Handle,
    first: int,
    count: int,
    last: int,
    notes: tuple[str, ...] = (),
    size: int = 1,
) -> None:
    """Keeps the ``first`` and ``last`` rows and the ``count`` best blocks, of ``size`` rows each, of those between,
    whose scores are [G or 1, n].

    notes: names of notes [G, N] that are kept alike, for blocks of one row.
    """
    picks = ops.picks(ops.top(scores, count), count) if count else None
    keep_picked(ops, layer, picks, first, last, notes, size)


def keep_picked(
    ops: Operations,
    layer: Layer,
    picks: Handle,
    first: int,
    last: int,
    notes: tuple[str, ...] = (),
    size: int = 1,
) -> None:
    """The same, where the blocks are picked already: one-hot [G or 1, count, n], ``None`` for none."""
    rows = len(layer)
    edges = [slice(0, first), slice(first, rows - last), slice(rows - last, rows)]

    def kept(handle: Callable[[slice], Handle], middle: Callable[[Handle], Handle]) -> list[Handle]:
        parts = [handle(edges[0])] if first else []
        parts += [] if picks is None else [middle(handle(edges[1]))]
        parts += [handle(edges[2])] if last else []
        return parts

    index = torch.arange(rows)
    for name in ("keys", "values"):
        stored = getattr(layer, name)

        def taken(edge: slice, stored: Handle = stored) -> Handle:
            return ops.take(stored, index[edge])

        parts = kept(taken, lambda part: ops.keep(part, picks, size))
        setattr(layer, name, _join(ops, parts, 1))
    for name in notes:
        note = layer.notes[name]

        def cut(edge: slice, note: Handle = note) -> Handle:
            return note[..., edge]

        parts = kept(cut, lambda part: _gathered(ops, picks, part))
        layer.notes[name] = _join(ops, parts, -1)
    layer.positions = None


def take(ops: Operations, layer: Layer, index: torch.Tensor) -> None:
    """Keeps the rows at public indices."""
    layer.keys, layer.values = ops.take(layer.keys, index), ops.take(layer.values, index)
    if layer.positions is not None:
        layer.positions = layer.positions[index]


def drop_lowest(ops: Operations, layer: Layer, scores: Handle, notes: tuple[str, ...] = ()) -> None:
    """Drops the row of the lowest score among the first rows, those that scores [G or 1, n] are of."""
    rows, candidates = len(layer), scores.shape[-1]
    hot = ops.top(ops.scale(scores, -1), 1)
    index = torch.arange(rows)
    for name in ("keys", "values"):
        stored = getattr(layer, name)
        parts = [ops.drop(ops.take(stored, index[:candidates]), hot)] if candidates > 1 else []
        parts += [ops.take(stored, index[candidates:])] if rows > candidates else []
        setattr(layer, name, _join(ops, parts, 1))
    for name in notes:
        layer.notes[name] = without(ops, layer.notes[name], hot)
    layer.positions = None


def without(ops: Operations, note: Handle, hot: Handle) -> Handle:
    """[G, N] without the number that hot [G, n], n <= N, marks: from there on each takes the next one's place."""
    candidates, rows = hot.shape[-1], note.shape[-1]
    parts = []
    if candidates > 1:
        after = ops.transform(hot, torch.ones(candidates, candidates).triu())[..., :-1]
        parts = [ops.choose(after, note[..., 1:candidates], note[..., : candidates - 1])]
    parts += [note[..., candidates:]] if rows > candidates else []
    return _join(ops, parts, -1)


def _gathered(ops: Operations, picks: Handle, note: Handle) -> Handle:
    heads, rows = note.shape
    return ops.gather(picks, note.reshape(heads, rows, 1)).reshape(heads, picks.shape[-2])


def _join(ops: Operations, parts: list[Handle], dim: int) -> Handle:
    return parts[0] if len(parts) == 1 else ops.cat(parts, dim)
