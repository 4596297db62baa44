"""What a config.json says of rotary position embedding, in every spelling that transformers has had.

Owns the supported rope types and the checks on their fields; what follows from them is in ``rope``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.models.fields import integer, number, short

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "divided")

_ROPE_READ = {
    *("type", "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor", "divisors"),
}
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base wavelength `theta` and how it is stretched beyond the trained context.

    `factor` is the stretch of linear, dynamic and llama3. The next three fields belong to llama3, and stay None
    otherwise; linear may have the last of them (see `LlamaConfig.context`). `divisors` belong to divided, GGUF's form
    of llama3: one for each frequency, head_dim / 2 of them. Raises UsageError on a value that is missing or out of
    range.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        number("rope_theta", self.theta)
        if self.type not in ROPE_TYPES:
            raise UsageError(f"rope type is {short(self.type)}; supported are {', '.join(ROPE_TYPES)}")
        if self.type == "divided":
            for divisor in self.divisors or (None,):
                number("a divisor of rope type divided", divisor)
        elif self.type != "default":
            number(f"factor of rope type {self.type}", self.factor, least=1)
        original = self.original_max_position_embeddings
        if self.type == "llama3" or original is not None:
            integer(f"original_max_position_embeddings of rope type {self.type}", original, limits.CONTEXT)
        if self.type == "llama3":
            low = number("low_freq_factor of rope type llama3", self.low_freq_factor)
            high = number("high_freq_factor of rope type llama3", self.high_freq_factor)
            if high <= low:
                raise UsageError(
                    f"high_freq_factor is {self.high_freq_factor!r}; it must be larger than "
                    f"low_freq_factor {self.low_freq_factor!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """`rope_parameters` as transformers 5 writes it."""
        values = {
            "rope_theta": self.theta,
            "rope_type": self.type,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "divisors": None if self.divisors is None else list(self.divisors),
        }
        return {name: value for name, value in values.items() if value is not None}


def read_rope(given: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5); when both are there they must agree."""
    theta = given.get("rope_theta")
    found: dict[str, RopeConfig] = {}
    for field in ("rope_scaling", "rope_parameters"):
        values = given.get(field)
        if not values:
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{field} is {short(values)}; it must be a JSON object")
        values = {name: value for name, value in values.items() if value is not None}
        for name in values.keys() - _ROPE_READ:
            raise UsageError(f"{field}.{name} is {short(values[name])}; this field is not supported")
        refuse_partial_rotation(f"{field}.partial_rotary_factor", values)
        kind = values.get("rope_type", values.get("type"))
        if kind is None and "factor" in values:
            raise UsageError(f"{field} is {short(values)}; it has a factor but no rope_type ({', '.join(ROPE_TYPES)})")
        if theta is not None and values.get("rope_theta", theta) != theta:
            raise UsageError(
                f"rope_theta is {short(theta)} but {field}.rope_theta is {short(values['rope_theta'])}; keep one"
            )
        # Values that the type does not use are dropped, as transformers does.
        used: dict[str, Any] = {"factor": values.get("factor")} if kind in ("linear", "dynamic", "llama3") else {}
        if kind == "divided":
            used["divisors"] = _listed(field, values.get("divisors"))
        if kind in ("linear", "llama3"):
            used[_ORIGINAL] = _original_context(field, values, given)
        if kind == "llama3":
            used |= {name: values.get(name) for name in ("low_freq_factor", "high_freq_factor")}
            if used[_ORIGINAL] is None:
                used[_ORIGINAL] = max_position_embeddings
        base = values.get("rope_theta", 10000.0 if theta is None else theta)
        found[field] = RopeConfig(theta=base, type="default" if kind is None else kind, **used)
    if len(set(found.values())) > 1:
        raise UsageError(f"rope_scaling is {short(given['rope_scaling'])} but rope_parameters say otherwise; keep one")
    return next(iter(found.values()), RopeConfig(theta=10000.0 if theta is None else theta))


def _listed(field: str, divisors: Any) -> tuple:
    if not isinstance(divisors, list) or not divisors:
        raise UsageError(f"{field}.divisors is {short(divisors)}; rope type divided needs a list of them")
    return tuple(divisors)


def _original_context(field: str, values: dict, given: dict) -> Any:
    """The context before the stretch; versions of transformers disagree which field wins, so both must say the same."""
    inner, outer = values.get(_ORIGINAL), given.get(_ORIGINAL)
    if inner is not None and outer is not None and inner != outer:
        raise UsageError(f"{_ORIGINAL} is {short(outer)} but {field}.{_ORIGINAL} is {short(inner)}; keep one")
    return outer if inner is None else inner


def refuse_partial_rotation(label: str, d: dict[str, Any]) -> None:
    factor = d.get("partial_rotary_factor")
    if factor is not None and factor != 1:
        raise UsageError(f"{label} is {short(factor)}; only 1 is supported (RoPE on the whole head)")
