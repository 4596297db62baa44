"""The operations of eviction policies on torch floats: the reference for those on shares.

Owns no policy. Names, shapes and meaning are those of ``eviction.operations``; ties go to the lower index.
"""

import torch


class PlainSelection:
    """Mixed into ``PlainEngine``; rows and handles are both plain tensors."""

    def public(self, value):
        return value.float().to(self.device)

    def scale(self, x, factor):
        return x * (factor.to(self.device) if isinstance(factor, torch.Tensor) else factor)

    def total(self, x, dim):
        return x.sum(dim)

    def transform(self, x, matrix):
        return x @ matrix.to(self.device)

    def within(self, x, limit):
        return x

    def mass(self, weights, queries):
        return torch.einsum("gmn,m->gn", weights, queries.to(self.device))

    def gather_scores(self, choice, scores):
        index = self._rows_of(choice, scores.shape[0])[:, None]
        return scores.gather(2, index.expand(-1, scores.shape[1], -1))

    def scatter_weights(self, choice, weights, count):
        index = self._rows_of(choice, weights.shape[0])[:, None].expand(-1, weights.shape[1], -1)
        return weights.new_zeros(*weights.shape[:2], count).scatter(2, index, weights)

    def _rows_of(self, choice, heads):
        """Indices [G, count] of the rows that a choice attends to."""
        rows = choice.rows.to(self.device).expand(heads, -1)
        if choice.picks is None:
            return rows
        starts = choice.first + choice.picks.argmax(-1) * choice.size
        blocks = starts[..., None] + torch.arange(choice.size, device=self.device)
        return torch.cat([rows, blocks.flatten(1).expand(heads, -1)], 1)

    def contents(self, rows):
        return rows

    def fixed(self, x, values=False):
        return x

    def take(self, rows, index):
        return rows[:, index.to(self.device)]

    def keep(self, rows, picks):
        return picks.to(rows.dtype) @ rows

    def drop(self, rows, hot):
        heads, count, dim = rows.shape
        kept = (hot.expand(heads, count) < 0.5).nonzero()[:, 1].reshape(heads, count - 1, 1)
        return rows.gather(1, kept.expand(-1, -1, dim))

    def top(self, x, count):
        best = x.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return torch.zeros_like(x).scatter(-1, best, 1.0)

    def best(self, x, count):
        return _one_hot(x.argsort(dim=-1, descending=True, stable=True)[..., :count], x)

    def picks(self, bits, count):
        index = (bits > 0.5).nonzero()[:, -1].reshape(*bits.shape[:-1], count)
        return _one_hot(index, bits)

    def gather(self, picks, x):
        return picks @ x

    def largest(self, x, dim):
        return x.amax(dim)

    def above(self, x, threshold):
        return (x > threshold).to(x.dtype)

    def multiply(self, x, y):
        return x * y

    def choose(self, bits, x, y):
        return torch.where(bits > 0.5, x, y)

    def coarse(self, rows, bits):
        levels = 2 ** (bits - 1) - 1
        return (rows.clamp(-1, 1) * levels).round() / levels

    def sigmoid(self, x):
        return x.sigmoid()

    def reciprocal(self, x, low, high):
        return 1 / x.clamp(low, high)


def _one_hot(index, like):
    """Rows [..., K, N] with a one at ``index`` [..., K] each, N being the last dimension of ``like``."""
    return like.new_zeros(*index.shape, like.shape[-1]).scatter_(-1, index[..., None], 1)
