"""``doctor``: is this machine ready, and if not, what to do.

Owns the checks that answer a first-time user's questions before a long run fails: versions, CrypTen, randomness,
memory, devices and their kernels, loopback links, and on each private engine an inference of a random model two layers
deep, compared with plaintext. The first run of it compiles the kernels of engine ``wire``, so that no later one waits
for that.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from crypten_llm.errors import CryptenLLMError, how_to_install, last_words

PACKAGES = (
    "torch",
    "crypten",
    "transformers",
    "safetensors",
    "cryptography",
    "numba",
    "tqdm",
    "omegaconf",
    "onnx",
    "datasets",
)
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Failed(Exception):
    """A check that did not pass; the message says what to do."""


def run(timeout: float) -> bool:
    """Runs every check, a line each; true when all passed."""
    checks = {
        "packages": _packages,
        "CrypTen import": _crypten,
        "cores and memory": _machine,
        "devices": _devices,
        "key stream": _randomness,
        "shipped model": _shipped,
        "engine crypten": lambda: _inference("crypten", timeout),
        "engine wire": lambda: _inference("wire", timeout),
    }
    if _cards():
        checks["engine wire, cuda"] = lambda: _inference("wire", timeout, "cuda")
    passed = all([line(name, check) for name, check in checks.items()])
    print("ready" if passed else "not ready")
    return passed


def line(name: str, check: Callable[[], Any]) -> bool:
    """Prints what a check finds; whether it passed."""
    started = time.perf_counter()
    try:
        mark, text = "ok", check()
    except Failed as problem:
        mark, text = "NO", str(problem)
    except CryptenLLMError as problem:
        mark, text = "NO", last_words(problem)
    except Exception as problem:  # a check must never hide the ones after it
        mark, text = "NO", f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    print(f"{mark}  {name:<18} {text}  ({time.perf_counter() - started:.1f} s)", flush=True)
    return mark == "ok"


def _packages() -> Any:
    found, missing = [f"Python {platform.python_version()} on {platform.machine()}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        advice = "; ".join(dict.fromkeys(how_to_install(name) for name in missing))
        raise Failed(f"{', '.join(missing)} not installed; {advice}")
    return ", ".join(found)


def _crypten() -> Any:
    from crypten_llm.compat import import_crypten

    crypten = import_crypten()
    return f"{crypten.__version__}, provider {crypten.cfg.mpc.provider}, randomness replaced by ChaCha20"


def _machine() -> Any:
    from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, cores

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < 4 << 30:
        raise Failed(f"{total / 2**30:.1f} GiB of memory; three parties on one machine need 4 GiB")
    threads = LaunchConfig().thread_count(ProtocolConfig().world)
    return f"{cores()} cores, {total / 2**30:.0f} GiB; three local parties use {threads} thread(s) each"


def _cards() -> dict[str, str]:
    from crypten_llm import devices

    return devices.found()


def _devices() -> Any:
    return "; ".join(["cpu", *(f"{name}: {card}, {kernels(name)}" for name, card in _cards().items())])


def kernels(name: str, or_fail: bool = False) -> str:
    """Whether engine ``wire``'s kernels of a device load, and give what the processor's give.

    or_fail: raise Failed where they do not load, instead of saying so.
    """
    import torch

    from crypten_llm.engines.wire import computing
    from crypten_llm.errors import UsageError
    from crypten_llm.kernels import ring

    try:
        device = computing.usable(name)
    except UsageError as error:
        if or_fail:
            raise Failed(str(error)) from None
        return str(error)
    words = torch.arange(-600, 600).view(30, 40) * 0x0123456789ABCDEF
    streams = [ring.on(place).KeyStream(bytes(32)).fill(4096).cpu() for place in ("cpu", device)]
    products = [ring.on(place).matmul_nt(words.to(place), words.to(place)).cpu() for place in ("cpu", device)]
    if not (torch.equal(*streams) and torch.equal(*products)):
        raise Failed(f"the kernels of {name} give other words than the processor's; leave --device out, and report it")
    return "whose kernels give what the processor's do"


def _randomness() -> Any:
    from crypten_llm.protocols.dealer.randomness import Stream, fresh_key

    stream, started = Stream(fresh_key()), time.perf_counter()
    stream.ring(1 << 22)
    return f"{32 / 1024 / (time.perf_counter() - started):.1f} GiB/s"


def _shipped() -> Any:
    from crypten_llm.models.checkpoint import SHIPPED, expected_shapes
    from crypten_llm.models.config import LlamaConfig

    config = LlamaConfig.from_folder(SHIPPED)
    parameters = sum(shape.numel() for shape in expected_shapes(config).values())
    layers, context = config.num_hidden_layers, config.max_position_embeddings
    return f"{parameters / 1e6:.1f} M parameters, {layers} layers, context {context}"


def write_tiny(folder: Path) -> Path:
    """Writes a random model of two layers (``TINY``) to ``folder``, and returns it; the same weights every time."""
    import torch
    from safetensors.torch import save_file

    from crypten_llm.models.checkpoint import expected_shapes
    from crypten_llm.models.config import LlamaConfig

    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(LlamaConfig.from_dict(TINY))
    weights = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(TINY))
    save_file(weights, folder / "model.safetensors")
    return folder


def _inference(engine: str, timeout: float, device: str = "cpu") -> Any:
    from crypten_llm.session.api import PrivateLlama

    with tempfile.TemporaryDirectory() as name:
        folder = str(write_tiny(Path(name)))
        request: dict[str, Any] = {"input_ids": list(range(12)), "max_new_tokens": 3}
        with PrivateLlama.from_pretrained(folder, engine="plain") as llama:
            expected = llama.generate(**request).token_ids
        with PrivateLlama.from_pretrained(folder, engine=engine, timeout=timeout, device=device) as llama:
            result = llama.generate(**request)
    if result.token_ids != expected:
        raise Failed(
            f"private tokens {result.token_ids} differ from plaintext {expected}; report this with the lines above"
        )
    return f"3 processes, {result.cost.rounds()} rounds, tokens equal plaintext's"
