"""What training minimises: cross-entropy by kind of target, and penalties on activations beyond their limits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experiments.model import forward
from experiments.model.rows import ANSWER, PROSE
from experiments.model.schedule import Limits, Settings


def _over(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Squared excess of |x| over the limit, summed over features, mean over tokens."""
    return F.relu(x.float().abs() - limit).square().sum() / (x.shape[0] * x.shape[-2])


def residual_penalty(x: torch.Tensor, limits: Limits) -> torch.Tensor:
    squares = x.float().square().mean(-1)
    low = F.relu(1 - squares / limits.mean_square_low).square().mean()
    return _over(x, limits.residual) + low + F.relu(squares - limits.mean_square_high).square().mean()


def penalised_block(x, layer, cos, sin, eps: float, limits: Limits):
    """One layer, and the penalty on what it computes (a scalar)."""
    x, a = forward.block(x, layer, cos, sin, eps)
    norms = sum(_over(t.float().norm(dim=-1).unsqueeze(-1), limits.head_norm) for t in (a.q, a.k))
    return x, (
        norms
        + _over(a.v, limits.v)
        + _over(a.gate, limits.gate)
        + _over(a.up, limits.up)
        + residual_penalty(a.attention_input, limits)
        + residual_penalty(a.ffn_input, limits)
    )


def head_losses(x, norm, embedding, targets, kinds, eps: float, s: Settings):
    """Weighted cross-entropy, its parts on answers and on prose, and the penalties on logits and last residual."""
    logits = forward.head(x, norm, embedding, eps)
    log_z = logits.logsumexp(-1)
    loss = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    answer, prose = (kinds == ANSWER).float(), (kinds == PROSE).float()
    weights = answer + s.prose_weight * prose
    cross_entropy = (loss * weights).sum() / weights.sum()
    penalty = F.relu(logits.abs().amax(-1) - s.limits.logit).square().mean() + residual_penalty(x, s.limits)
    z = (log_z.square() * weights).sum() / weights.sum()
    return (
        cross_entropy + s.z_loss * z,
        penalty,
        (loss * answer).sum() / answer.sum().clamp_min(1),
        (loss * prose).sum() / prose.sum().clamp_min(1),
    )
