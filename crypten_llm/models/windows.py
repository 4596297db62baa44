"""How far attention looks back in each layer, as a config.json says it in the words of its family.

Owns the fields ``sliding_window``, ``use_sliding_window``, ``max_window_layers`` and ``layer_types``, read as
transformers reads them. A window of W tokens lets a token see itself and the W - 1 before it. It imports no tensor
library; what a window does to masks and caches is in ``llama`` and ``cache``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.models.fields import integer, is_integer, short

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT = 4096  # transformers' for an absent ``sliding_window``
Windows = tuple[int | None, ...]
Reading = Callable[[Mapping[str, Any], int], list[Any]]
"""From config.json and the count of layers, each layer's window as it is written there; None for all tokens."""


def nowhere(given: Mapping[str, Any], layers: int) -> list[Any]:
    _refuse_types_but(given, layers, FULL)
    return [None] * layers


def everywhere(given: Mapping[str, Any], layers: int) -> list[Any]:
    """The same in all layers; ``layer_types``, which transformers leaves unread here, may not say otherwise."""
    window = given.get("sliding_window", DEFAULT)
    _refuse_types_but(given, layers, FULL if window is None else SLIDING)
    return [window] * layers


def by_layer(given: Mapping[str, Any], layers: int) -> list[Any]:
    """Where ``use_sliding_window``, in the layers of that type, or without types from ``max_window_layers`` on."""
    window = given.get("sliding_window", DEFAULT) if given.get("use_sliding_window") else None
    if window is None:
        _refuse_types_but(given, layers, FULL)
        return [None] * layers
    types = given.get("layer_types")
    if types is not None:
        return [window if kind == SLIDING else None for kind in _types(types, layers, FULL, SLIDING)]
    first = given.get("max_window_layers", 28)
    if not is_integer(first):
        raise UsageError(f"max_window_layers is {short(first)}; it must be an integer")
    return [window if layer >= first else None for layer in range(layers)]


def read_windows(reading: Reading, given: Mapping[str, Any], layers: int, context: int) -> Windows:
    """Each layer's window; ``()`` where none hides anything, since all are as long as the context.

    Raises UsageError for a field that is not as transformers takes it.
    """
    most = limits.CONTEXT
    found = [None if window is None else integer("sliding_window", window, most) for window in reading(given, layers)]
    if 1 in found:
        raise UsageError("sliding_window is 1; it must be at least 2 (a token that sees itself alone is no attention)")
    kept = tuple(None if window is None or window >= context else window for window in found)
    return kept if any(kept) else ()


def write_windows(windows: Windows, fields: Collection[str]) -> dict[str, Any]:
    """The fields of a config.json from which ``read_windows`` reads these; ``fields``: those that its family has."""
    if "sliding_window" not in fields:
        return {}
    if not windows:
        return {"sliding_window": None}  # in some families its absence means a window
    values = {
        "sliding_window": next(filter(None, windows)),
        "use_sliding_window": True,
        "layer_types": [SLIDING if window else FULL for window in windows],
    }
    return {name: value for name, value in values.items() if name in fields or name == "layer_types"}


def _refuse_types_but(given: Mapping[str, Any], layers: int, kind: str) -> None:
    """Raises UsageError for ``layer_types`` that are there and not all of this kind."""
    types = given.get("layer_types")
    if types is not None:
        _types(types, layers, kind)


def _types(types: Any, layers: int, *kinds: str) -> list[str]:
    if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
        raise UsageError(
            f"layer_types is {short(types)}; with the other fields of this config it must be {' or '.join(kinds)} for "
            f"each of the {layers} layers"
        )
    return types
