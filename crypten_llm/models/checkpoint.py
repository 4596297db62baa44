"""Model folders and GGUF files: finding or downloading them, their tokenizer, and reading their weights one by one.

Owns every access to weight files, and only the model owner's process may call `load_weights`; the other parties know
the shapes from the public config (`expected_shapes`). Weights are read from safetensors and GGUF alone: a pickle can
run code on load, so none is ever opened or downloaded. Names are Hugging Face's
("model.layers.0.self_attn.q_proj.weight").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open

from crypten_llm import files as reading
from crypten_llm import limits
from crypten_llm.errors import UsageError, first_line
from crypten_llm.models import gguf_file, tokenizer
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.hub import HUB_ID, download
from crypten_llm.models.stored import Stored
from crypten_llm.records import Extract

SHIPPED = Path(__file__).parents[1] / "shipped"

_TEXT_PATTERNS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS = ", ".join(_DTYPES.values())
# Frequencies that old versions of transformers saved; they follow from the config.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class _Index(Extract, frozen=True):
    """weight_map: by tensor, the file of this folder that holds it."""

    weight_map: Annotated[dict[str, Annotated[str, Meta(pattern=r"^[^/\x00]+$", max_length=255)]], Meta(min_length=1)]


def resolve_model(name_or_path: str | Path, offline: bool = False) -> Path:
    """Where a model is: "shipped" (the one in this package), a local folder or GGUF file, or a Hugging Face hub id.

    A hub id is downloaded to the local cache, safetensors weights included, unless `offline`, which only looks into
    that cache. A local folder wins over a hub id of the same name. Raises UsageError saying what to do.
    """
    return _resolve(name_or_path, offline, (*_TEXT_PATTERNS, "*.safetensors"))


def resolve_config(name_or_path: str | Path, offline: bool = False) -> Path:
    """As ``resolve_model``, for who needs config.json alone: no weights are downloaded."""
    return _resolve(name_or_path, offline, ("config.json",))


def load_tokenizer(name_or_path: str | Path, offline: bool = False) -> Any:
    """The tokenizer (see ``tokenizer.load``) of a model named as for `resolve_model`, without downloading its weights.

    Raises UsageError when there is no tokenizer or it does not load.
    """
    return tokenizer.load(resolve_tokenizer(name_or_path, offline))


def resolve_tokenizer(name_or_path: str | Path, offline: bool = False) -> Path:
    """As ``resolve_model``, for who needs the tokenizer alone: no weights are downloaded."""
    return _resolve(name_or_path, offline, _TEXT_PATTERNS)


def expected_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Every parameter of the model with its shape, in order of computation (``Family.shapes``)."""
    return {name: torch.Size(shape) for name, shape in config.family.shapes(config).items()}


def load_weights(folder: str | Path, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, float32 tensor) for each of `expected_shapes(config)`, in that order, reading one at a time.

    folder: or a GGUF file, whose quantised weights become the floats that they stand for.

    The headers of all files are checked before this returns, so a wrong folder fails before any work is done.
    Tensors of a float32 file are mapped from it, copied only where written to. Raises UsageError listing every missing,
    unexpected or misshapen tensor; and while iterating, naming the first tensor with NaN or infinite values.
    """
    files = gguf_file.stored(folder, config) if gguf_file.is_gguf(folder) else _open(Path(folder))
    expected = expected_shapes(config)
    _check_tensors(Path(folder), files, expected)
    if config.tie_word_embeddings and "lm_head.weight" in files:
        embedding = "model.embed_tokens.weight"
        if not torch.equal(*(files[name].read() for name in ("lm_head.weight", embedding))):
            raise UsageError(
                f"{folder}: tie_word_embeddings is true but lm_head.weight differs from {embedding}; "
                "set tie_word_embeddings to false in config.json if both are meant"
            )
    return _read(Path(folder), files, expected)


def _read(
    folder: Path, files: dict[str, Stored], expected: dict[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in expected:
        tensor = files[name].read().to(torch.float32)
        # Both extremes are NaN if any element is; no mask of the tensor's size is needed.
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UsageError(f"{folder}: {name} has NaN or infinite values; get a sound copy of the checkpoint")
        yield name, tensor


def _resolve(name_or_path: str | Path, offline: bool, patterns: tuple[str, ...]) -> Path:
    name = str(name_or_path)
    if name == "shipped":
        if not SHIPPED.is_dir():
            raise UsageError("the shipped model is not part of this installation; reinstall the package")
        return SHIPPED
    path = Path(name).expanduser()
    if name and path.is_dir():
        reading.check_folder(path)
        return path
    if gguf_file.is_gguf(path):
        if not path.is_file():
            raise UsageError(f"{name}: no such file; give a GGUF file, a model folder, a Hugging Face id or 'shipped'")
        return path
    if name and path.exists():
        raise UsageError(
            f"{name} is a file; give the model folder that holds config.json and *.safetensors, or a GGUF file"
        )
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name!r}: no such folder; give a model folder, a Hugging Face id (owner/name) or 'shipped'")
    # Files in sub-folders are other formats of the same weights.
    return download(name, offline, patterns, ignore=("*/*",))


def _open(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder. Opening maps a file into memory, it reads no more than its header."""
    holders: dict[str, Stored] = {}
    index = _weight_files(folder)
    for file in dict.fromkeys(index.values()):
        path = folder / file
        try:
            holder = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UsageError(f"{path} is missing; download the model again") from None
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} {_unreadable(path, error)}") from error
        # The single-file index names no tensor; a sharded one says which file counts.
        holders |= {name: _stored(holder, name) for name in holder.keys() if index.get(name, file) == file}
    return holders


def _stored(holder: safe_open, name: str) -> Stored:
    header = holder.get_slice(name)
    kind = header.get_dtype()
    return Stored(tuple(header.get_shape()), _DTYPES.get(kind, kind), kind in _DTYPES, lambda: holder.get_tensor(name))


def _weight_files(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the index; {"": file} for a folder with one file."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a model folder that holds *.safetensors")
    reading.check_folder(folder)
    if (folder / single).exists():  # transformers prefers it, too
        return {"": single}
    if not (folder / index).exists():
        raise UsageError(_no_weights(folder, single, index))
    try:
        files = reading.read_json(folder / index, _Index, limits.TOKENIZER_BYTES).weight_map
    except UsageError as error:
        raise UsageError(
            f"{error}; no usable index (weight_map names files of this folder): download it again"
        ) from None
    missing = sorted(file for file in set(files.values()) if not (folder / file).exists())
    if missing:
        raise UsageError(f"{folder}: {_shortened(missing)} missing; download the model again")
    return files


def _no_weights(folder: Path, single: str, index: str) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: only pickle checkpoints ({_shortened(pickles)}), which can run code when opened; if you trust "
            'them, convert to safetensors: python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
            f"[part.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') "
            'for part in (AutoModelForCausalLM, AutoTokenizer)]"'
        )
    others = sorted(path.name for pattern in ("*.safetensors", "*.gguf") for path in folder.glob(pattern))
    found = f" but {_shortened(others)}" if others else ""
    return (
        f"{folder}: no {single} or {index}{found}; give a folder with safetensors weights (a hub model: run once "
        "without --offline to complete it; if it has only pickle checkpoints, convert them first)"
    )


def _unreadable(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder"
    return f"cannot be read as safetensors ({first_line(error)}); download it again"


def _check_tensors(folder: Path, files: dict[str, Stored], expected: dict[str, torch.Size]) -> None:
    """Raise one UsageError that lists everything about names, shapes and types that is not as expected."""
    missing = [name for name in expected if name not in files]
    accepted = expected.keys() | {"lm_head.weight"}  # with tied embeddings its value is compared later
    unexpected = sorted(name for name in files if name not in accepted and not _DERIVED.search(name))
    shapes, dtypes = [], []
    for name, shape in expected.items():
        if name in files:
            found = files[name]
            if found.shape != shape:
                shapes.append(f"{name} {list(found.shape)} instead of {list(shape)}")
            if not found.known:
                dtypes.append(f"{name} {found.kind}")
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": shapes,
        f"not {_FLOATS if not gguf_file.is_gguf(folder) else 'of a type that can be read'}": dtypes,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_shortened(names)}" for what, names in problems.items() if names)
        said = "its metadata" if gguf_file.is_gguf(folder) else "config.json"
        raise UsageError(f"{folder}: the weights do not fit {said}: {listed}")


def _shortened(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
