"""What decides the trained weights: the settings of a run, its penalties' limits, its rates and lengths by step."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Where penalties begin. Each is well inside what the fixed-point engines need, since a penalty is no wall."""

    head_norm: float = 10.0  # of q and k: a score is then at most 10 * 10 / sqrt(32) = 17.7
    gate: float = 7.0
    up: float = 8.0
    v: float = 8.0
    residual: float = 15.0
    mean_square_low: float = 0.15
    mean_square_high: float = 16.0
    logit: float = 25.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained weights."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 704
    rope_theta: float = 1e6
    positions: int = 4096
    embedding_std: float = 0.5

    steps: int = 16_000
    max_minutes: float = math.inf
    batch_tokens: int = 65_536
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-5
    warmup: int = 200
    decay_from: float = 0.6  # share of the run after which the rate falls, linearly
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    prose_weight: float = 0.03
    # A question of two hops must be answered in one token, which is slow to be discovered. So a probe, dropped after
    # training, reads the word between the hops out of the residual after this many layers.
    bridge_after: int = 4
    bridge_weight: float = 0.5
    penalty: float = 0.1
    z_loss: float = 1e-4
    limits: Limits = Limits()
    seed: int = 1

    # (share of the run at which the stage ends, sequence lengths, their probabilities)
    stages: tuple = (
        (0.15, [256], [1.0]),
        (0.30, [256, 512, 1024], [0.3, 0.4, 0.3]),
        (0.60, [256, 1024, 2048], [0.1, 0.5, 0.4]),
        (1.00, [256, 1024, 2048, 4096], [0.1, 0.2, 0.5, 0.2]),
    )
    mix: dict[str, float] = field(
        default_factory=lambda: {
            "two_hop": 0.30,
            "one_hop": 0.15,
            "key_value": 0.17,
            "few_shot": 0.12,
            "span_copy": 0.08,
            "variables": 0.08,
            "passkey": 0.05,
            "stories": 0.05,
        }
    )

    log_every: int = 50
    evaluate_every: int = 1000
    evaluate_samples: int = 64
    evaluate_length: int = 1024
    checkpoint_every: int = 1000
    workers: int = 14


SMOKE = Settings(
    hidden=32,
    layers=2,
    bridge_after=1,
    heads=4,
    kv_heads=2,
    ffn=64,
    positions=256,
    steps=60,
    batch_tokens=2048,
    warmup=10,
    stages=((0.5, [64], [1.0]), (1.0, [128], [1.0])),
    log_every=10,
    evaluate_every=30,
    evaluate_samples=4,
    evaluate_length=128,
    checkpoint_every=20,
    workers=0,
)


def learning_rate(s: Settings, step: int, progress: float) -> float:
    """Linear warm-up, constant, linear decay over the last part of the run."""
    warm = min(1.0, (step + 1) / s.warmup)
    fall = min(1.0, max(0.0, (progress - s.decay_from) / (1 - s.decay_from)))
    return warm * (s.learning_rate + fall * (s.final_learning_rate - s.learning_rate))


def length_of(s: Settings, step: int, progress: float) -> int:
    """Sequence length of a batch, drawn from the stage that `progress` lies in."""
    _, lengths, chances = next((stage for stage in s.stages if progress < stage[0]), s.stages[-1])
    return random.Random(f"{s.seed}/{step}/length").choices(lengths, chances)[0]
