"""The ranges in which engine ``wire`` is right, and what of them a model can be proved, or was seen, to keep.

Owns ``domains``, gathered from what is declared at the operations, and ``calibrate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crypten_llm.engines.domain import CHECKED, MEASURED, PROVED, Calibration, Limit, Reached
from crypten_llm.engines.wire import attention, layers  # noqa: F401  (they enter what they limit into the table)
from crypten_llm.engines.wire.numbers import EMBEDDING, WireConfig
from crypten_llm.engines.wire.operations import OPERATIONS

if TYPE_CHECKING:
    from crypten_llm.session.calibration import Ranges

_PROVED = {
    "swiglu gates": "gate_proj",
    "swiglu up": "up_proj",
    "mix": "v_proj",
    "logits": "lm_head",
    "embed": EMBEDDING,
}
"""By what is limited, whose weights bound it. What attention mixes is no larger than the largest of the values."""

_CHECKED = ("rms_norm", "residual", "residual added", "softmax", "softmax row")
"""What flags look at in each step; what they cannot see is in docs/wire.md."""


def domains(config: WireConfig) -> dict[str, Limit]:
    """What is limited, by the operation and, where it limits several things, which of them.

    Beyond, its result is wrong, which the flags of each step may or may not see.
    """
    found = {}
    for name, operation in OPERATIONS.items():
        for which, domain in operation.domains.items():
            key = name if which == "domain" else f"{name} {which}"
            found[key] = Limit(domain.what, domain.low(config), domain.high(config))
    states, logits, entries = (2.0**bits for bits in (config.hidden_bits, config.logit_bits, config.embedding_bits))
    found["residual added"] = Limit("what a layer adds to hidden states", -states, states)
    found["logits"] = Limit("logits", -logits, logits)
    found["embed"] = Limit("entries of the embedding", -entries, entries)
    return found


def calibrate(config: WireConfig, ranges: Ranges) -> Calibration:
    """Proved where the weights prove it, else as measured; gates and what comes of them have to be proved."""
    reached = []
    for name, limit in domains(config).items():
        most = ranges.proved.get(_PROVED.get(name, ""))
        seen = ranges.limited.get(name)
        if most is not None and (seen is None or name != "mix" or most <= limit.high):
            reached.append(Reached(limit, -most, most, PROVED))
        elif seen is not None:
            reached.append(Reached(limit, *seen, CHECKED if name in _CHECKED else MEASURED))
    return Calibration("wire", reached=reached)
