"""Trained policies: what they see of a token, and where their weights come from.

Owns the features and the weights that this process knows. Weights are public: whoever runs the policy knows them, so
products with them are linear maps with public coefficients. They were trained on a model, and tell about it what a
trained file tells.

A policy's text comes from another party, so it names weights and never a file: those that come with the project, or
such as whoever started this process gave it (``register``), by a digest of what they are.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eviction.operations import Handle, Layer, Operations, Seen
from eviction.settings import PolicyError, setting

FOLDER = Path(__file__).parent / "weights"
SHIPPED = "shipped"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_NAMED = re.compile(rf"{_NAME.pattern}#[0-9a-f]{{16}}")
TRAINER = "experiments.model.train_policies"
_digests: dict[str, str] = {}  # of what was registered, by the name that it has here
_known: dict[str, dict[str, torch.Tensor]] = {}  # by digest, weights by name


def register(name: str, data: bytes) -> str:
    """Makes weights known to this process; data: a file of ``TRAINER``, or of ``crypten_llm calibrate``.

    Returns NAME#DIGEST, which stands for them in a policy's text; NAME alone does so in this process. Raises
    PolicyError for what cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    name, digest = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100], hashlib.sha256(data).hexdigest()[:16]
    if not name or any(FOLDER.glob(f"*-{name}.safetensors")):
        raise PolicyError(f"weights cannot be called {name!r}; give the file another name")
    try:
        _known[digest] = {key: value.float() for key, value in load(data).items()}
    except (SafetensorError, ValueError) as error:
        raise PolicyError(f"the weights {name} cannot be read ({error}); train them again") from None
    _digests[name] = digest
    return f"{name}#{digest}"


def registered(key: str) -> list[str]:
    """NAME#DIGEST of those weights registered here that have one of that name."""
    return [f"{name}#{digest}" for name, digest in _digests.items() if key in _known[digest]]


def weights(*others: str, default: str = SHIPPED) -> str:
    """A setting: ``shipped`` or one of ``others``, which come with the project, or the name of weights that all parties
    were started with. The policy's text, which they compare, holds a digest of these: NAME#DIGEST.
    """

    def read(value: Any) -> str:
        if value in (SHIPPED, *others) or _NAMED.fullmatch(value):
            return value
        if value not in _digests:
            raise ValueError
        return f"{value}#{_digests[value]}"

    names = " or ".join((SHIPPED, *others))
    what = f"{names}, or the name of weights that every party was started with (--policy-weights FILE)"
    return setting(default, read, what, "text")


def features(ops: Operations, layer: Layer, seen: Seen) -> Handle:
    """[T, (heads + 2 * kv_heads) * head_dim]: a token's queries and keys before the rotary embedding, and values."""
    heads, kv_heads, dim, rows = layer.heads, layer.kv_heads, layer.head_dim, seen.key_before.shape[1]
    query = seen.query_before.reshape(heads, rows, dim)
    parts = ((query, heads), (seen.key_before, kv_heads), (seen.value, kv_heads))
    return ops.cat([part.permute(1, 0, 2).reshape(rows, count * dim) for part, count in parts], 1)


def width(layer: Layer) -> int:
    """Features of a token."""
    return (layer.heads + 2 * layer.kv_heads) * layer.head_dim


def load(name: str, policy: str, made_for: str = "") -> dict[str, torch.Tensor]:
    """Weights by name, float32: those that come with the project for ``policy``, or registered ones, NAME#DIGEST.

    made_for: the policy whose weights it takes, where that is another. Raises PolicyError for those that are not known
    here.
    """
    if not _NAMED.fullmatch(name):
        return _shipped(made_for or policy, name)
    digest = name.rpartition("#")[2]
    if digest not in _known:
        raise PolicyError(
            f"policy {policy}: no weights {name} are known here; start every party with the same --policy-weights FILE"
        )
    return _known[digest]


@cache
def _shipped(policy: str, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: value.float() for key, value in load_file(FOLDER / f"{policy}-{name}.safetensors").items()}


def matrix(
    weights: dict, key: str, layer: Layer, rows: int, columns: int | None, policy: str, by: str = TRAINER
) -> torch.Tensor:
    """A layer's matrix; raises PolicyError when it is for another model. by: the command that makes such files."""
    found = weights.get(f"layers.{layer.index}.{key}")
    if found is None or found.shape[0] != rows or (columns is not None and found.shape[1] != columns):
        shape = "missing" if found is None else f"{tuple(found.shape)}"
        raise PolicyError(
            f"policy {policy}: its weights are for another model: layers.{layer.index}.{key} is {shape}, not "
            f"({rows}, {columns or 'any'}); train it on this model (python -m {by})"
        )
    return found
