"""The operations of eviction policies on torch floats: the reference for those on shares.

Owns no policy. Names, shapes and meaning are those of ``eviction.operations``; ties go to the lower index.
"""

import torch

from eviction.operations import Choice


class PlainSelection:
    """Mixed into ``PlainEngine``; rows and handles are both plain tensors."""

    device: torch.device

    def public(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device)

    def scale(self, x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
        return x * (factor.to(self.device) if isinstance(factor, torch.Tensor) else factor)

    def total(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.sum(dim)

    def transform(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return x @ matrix.to(self.device)

    def within(self, x: torch.Tensor, limit: float) -> torch.Tensor:
        return x

    def mass(self, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return torch.einsum("gmn,m->gn", weights, queries.to(self.device))

    def gather_scores(self, choice: Choice, scores: torch.Tensor) -> torch.Tensor:
        index = self._rows_of(choice, scores.shape[0])[:, None]
        return scores.gather(2, index.expand(-1, scores.shape[1], -1))

    def scatter_weights(self, choice: Choice, weights: torch.Tensor, count: int) -> torch.Tensor:
        index = self._rows_of(choice, weights.shape[0])[:, None].expand(-1, weights.shape[1], -1)
        return weights.new_zeros(*weights.shape[:2], count).scatter(2, index, weights)

    def _rows_of(self, choice: Choice, heads: int) -> torch.Tensor:
        """Indices [G, count] of the rows that a choice attends to."""
        rows = choice.rows.to(self.device).expand(heads, -1)
        if choice.picks is None:
            return rows
        starts = choice.first + choice.picks.argmax(-1) * choice.size
        blocks = starts[..., None] + torch.arange(choice.size, device=self.device)
        return torch.cat([rows, blocks.flatten(1).expand(heads, -1)], 1)

    def contents(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def fixed(self, x: torch.Tensor, values: bool = False) -> torch.Tensor:
        return x

    def take(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return rows[:, index.to(self.device)]

    def keep(self, rows: torch.Tensor, picks: torch.Tensor, size: int = 1) -> torch.Tensor:
        heads, count, dim = rows.shape
        blocks = rows.reshape(heads, count // size, size * dim)
        return (picks.to(rows.dtype) @ blocks).reshape(heads, -1, dim)

    def drop(self, rows: torch.Tensor, hot: torch.Tensor) -> torch.Tensor:
        heads, count, dim = rows.shape
        kept = (hot.expand(heads, count) < 0.5).nonzero()[:, 1].reshape(heads, count - 1, 1)
        return rows.gather(1, kept.expand(-1, -1, dim))

    def top(self, x: torch.Tensor, count: int) -> torch.Tensor:
        best = x.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return torch.zeros_like(x).scatter(-1, best, 1.0)

    def best(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return _one_hot(x.argsort(dim=-1, descending=True, stable=True)[..., :count], x)

    def picks(self, bits: torch.Tensor, count: int) -> torch.Tensor:
        index = (bits > 0.5).nonzero()[:, -1].reshape(*bits.shape[:-1], count)
        return _one_hot(index, bits)

    def gather(self, picks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return picks @ x

    def largest(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.amax(dim)

    def above(self, x: torch.Tensor, threshold: float) -> torch.Tensor:
        return (x > threshold).to(x.dtype)

    def multiply(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y

    def choose(self, bits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(bits > 0.5, x, y)

    def coarse(self, rows: torch.Tensor, bits: int) -> torch.Tensor:
        levels = 2 ** (bits - 1) - 1
        return (rows.clamp(-1, 1) * levels).round() / levels

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()

    def reciprocal(self, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return 1 / x.clamp(low, high)


def _one_hot(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows [..., K, N] with a one at ``index`` [..., K] each, N being the last dimension of ``like``."""
    return like.new_zeros(*index.shape, like.shape[-1]).scatter_(-1, index[..., None], 1)
