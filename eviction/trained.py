"""Trained policies: what they see of a token, and the files that hold their weights.

Owns the features and the loader. Weights are public: whoever runs the policy knows them, so products with them are
linear maps with public coefficients. They were trained on a model, and tell about it what a trained file tells.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eviction.operations import Handle, Layer, Operations, Seen
from eviction.settings import PolicyError, setting, text

FOLDER = Path(__file__).parent / "weights"


def weights(default: str = "shipped") -> str:
    """A setting: the name of weights that come with the project, or a file. Each party reads its own, so the policy's
    text, which they compare, holds a digest of the file: PATH#DIGEST.
    """
    kind: Any = text(default)
    plain = kind.metadata["read"]

    def read(value: str) -> str:
        path, _, digest = (value, "", "") if Path(plain(value)).is_file() else value.rpartition("#")
        if not Path(path).is_file():
            return value
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        if digest not in ("", found):
            raise ValueError
        return f"{path}#{found}"

    return setting(default, read, f"{default}, or a file that is alike at all parties", "text")


def features(ops: Operations, layer: Layer, seen: Seen) -> Handle:
    """[T, (heads + 2 * kv_heads) * head_dim]: a token's queries and keys before the rotary embedding, and values."""
    heads, kv_heads, dim, rows = layer.heads, layer.kv_heads, layer.head_dim, seen.key_before.shape[1]
    query = seen.query_before.reshape(heads, rows, dim)
    parts = ((query, heads), (seen.key_before, kv_heads), (seen.value, kv_heads))
    return ops.cat([part.permute(1, 0, 2).reshape(rows, count * dim) for part, count in parts], 1)


def width(layer: Layer) -> int:
    """Features of a token."""
    return (layer.heads + 2 * layer.kv_heads) * layer.head_dim


@cache
def load(name: str, policy: str) -> dict[str, torch.Tensor]:
    """Weights by name from ``weights/POLICY-NAME.safetensors``, or from the file ``name``, as float32.

    Raises PolicyError for a file that is not there or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shipped = FOLDER / f"{policy}-{name}.safetensors"
    path = shipped if shipped.exists() else Path(name.rpartition("#")[0] or name)
    try:
        return {key: value.float() for key, value in load_file(path).items()}
    except FileNotFoundError:
        names = sorted(file.stem.removeprefix(f"{policy}-") for file in FOLDER.glob(f"{policy}-*.safetensors"))
        there_are = ", ".join(names) or "none"
        raise PolicyError(f"policy {policy}: no weights {name!r}; give a file or one of: {there_are}") from None
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"policy {policy}: cannot read the weights {path} ({error}); train them again") from None


def matrix(weights: dict, key: str, layer: Layer, rows: int, columns: int | None, policy: str) -> torch.Tensor:
    """A layer's matrix; raises PolicyError when it is for another model."""
    found = weights.get(f"layers.{layer.index}.{key}")
    if found is None or found.shape[0] != rows or (columns is not None and found.shape[1] != columns):
        shape = "missing" if found is None else f"{tuple(found.shape)}"
        raise PolicyError(
            f"policy {policy}: its weights are for another model: layers.{layer.index}.{key} is {shape}, not "
            f"({rows}, {columns or 'any'}); train it on this model (python -m experiments.model.train_policies)"
        )
    return found
