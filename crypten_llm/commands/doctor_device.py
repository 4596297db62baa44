"""``doctor --device``: what the GPUs are on which parties would be, what lies between them, and whether a model fits.

Owns the checks of a placement: a device for all parties, or one for each, by rank. Every check is a line: what was
found, or what is wrong and what to do next. What a run can do without (sharing a card without turns, memory of another
card) is marked like all that fails, and keeps nobody from being ready.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm import devices, memory
from crypten_llm.commands.doctor import Failed, kernels, line
from crypten_llm.links.staging import Staging
from crypten_llm.session.bench import Shape
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

CAPABILITY = (8, 0)  # below, products of doubles and of bytes are far slower, and nothing was tried
PINNED_BYTES = 1 << 28
SLOW = 5e9  # bytes a second through pinned memory; PCIe has five times as many
TURN = 2e-4  # seconds of a small kernel; of processes that take turns a turn has a millisecond or two
TRIES = 50
STEPS = Shape(hidden=64, heads=4, kv_heads=2, ffn=96, kv_len=64, steps=20)  # whose rounds are next to nothing else
MPS = "start nvidia-cuda-mps-control -d on this host before the parties"


def run(placement: str, timeout: float, config: LlamaConfig | None = None, tokens: int = 0) -> bool:
    """A line for each check; true when all passed that a run needs. config, tokens: of a model, and of prompt and
    answer together, which are to fit.
    """
    named = [devices.numbered(name) for name in placement.split(",")]
    cards = list(dict.fromkeys(name for name in named if name != "cpu"))
    there: dict[str, Callable[[], Any]] = {"torch and Triton": _packages} if cards else {}
    for name in cards:
        there |= {name: partial(_card, name), f"kernels of {name}": partial(_kernels, name)}
    if not _all(there):  # nothing can be measured of what cannot be used
        print("not ready")
        return False
    needed: dict[str, Callable[[], Any]] = {f"{name} and pinned": partial(_pinned, name) for name in cards}
    needed["link: sockets"] = partial(_link, placement, timeout, False)
    if config is not None:
        needed["memory"] = partial(_fits, named, config, tokens)
    shared = [name for name in cards if len(named) == 1 or named.count(name) > 1]
    useful: dict[str, Callable[[], Any]] = {f"sharing {name}": partial(_sharing, name) for name in shared}
    if cards and torch.cuda.device_count() > 1:
        useful["between cards"] = _between
    if all(name != "cpu" for name in (named * 2)[:2]):
        useful["link: peer memory"] = partial(_link, placement, timeout, True)
    passed, spare = _all(needed), _all(useful)
    print("not ready" if not passed else "ready" if spare else "ready, but for what is marked NO")
    return passed


def _all(checks: dict[str, Callable[[], Any]]) -> bool:
    """Whether all pass; each is made."""
    return all([line(name, check) for name, check in checks.items()])


def _packages() -> str:
    try:
        return f"torch {torch.__version__} for CUDA {torch.version.cuda}, Triton {version('triton')}"
    except PackageNotFoundError:
        raise Failed("Triton is not installed; take a torch that was built for CUDA, it comes with it") from None


def _card(name: str) -> str:
    device = devices.usable(name)
    free, total = torch.cuda.mem_get_info(device)
    major, minor = capability = torch.cuda.get_device_capability(device)
    found = f"{torch.cuda.get_device_name(device)}, {size(free)} free of {size(total)}, capability {major}.{minor}"
    if capability < CAPABILITY:
        raise Failed(f"{found}; take a card of {CAPABILITY[0]}.{CAPABILITY[1]} or later, or --device cpu")
    return found


def _kernels(name: str) -> str:
    return kernels(name, or_fail=True)


def _pinned(name: str) -> str:
    """How fast what travels over sockets comes from the card, and to it."""
    staging = Staging(name)
    data = torch.zeros(PINNED_BYTES, dtype=torch.uint8, device=name)
    out = PINNED_BYTES / _seconds(lambda: staging.to_host(data), name)
    here = staging.empty((PINNED_BYTES,), torch.uint8)
    back = PINNED_BYTES / _seconds(lambda: staging.to_device(here), name)
    found = f"{out / 1e9:.1f} GB/s from the card, {back / 1e9:.1f} GB/s to it, through pinned memory"
    if min(out, back) < SLOW:
        raise Failed(f"{found}; a card in a full slot of its own processor copies faster, or take --peer-memory")
    return found


def _seconds(act: Callable[[], Any], name: str, tries: int = 4) -> float:
    """Of one call, the device's part included; the first is not counted."""
    found = []
    for _ in range(tries):
        started = time.perf_counter()
        act()
        _finish(name)
        found.append(time.perf_counter() - started)
    return median(found[1:])


def _finish(name: str) -> None:
    if name != "cpu":
        torch.cuda.synchronize(name)


def _small(name: str) -> float:
    """Seconds of a small kernel that is waited for."""
    number = torch.zeros(1, device=name)
    return _seconds(lambda: number.add_(1), name, TRIES)


def _busy(name: str, has_begun: Any, stop: Any) -> None:
    """In a process of its own: keeps the card at work until it is told to stop."""
    numbers = torch.zeros(1 << 22, device=name)
    while not stop.is_set():
        for _ in range(20):
            numbers.add_(1)
        _finish(name)
        has_begun.set()


def _sharing(name: str) -> str:
    """Whether another process's work has to end its turn before this one's begins."""
    alone = _small(name)
    context = multiprocessing.get_context("spawn")
    has_begun, stop = context.Event(), context.Event()
    other = context.Process(target=_busy, args=(name, has_begun, stop), daemon=True)
    other.start()
    try:
        if not has_begun.wait(60):
            raise Failed("a second process did not begin to compute within 60 s; look at what else uses the card")
        beside = _small(name)
    finally:
        stop.set()
        other.join(10)
        if other.is_alive():
            other.kill()
    found = f"a small kernel takes {1e6 * alone:.0f} us alone and {1e6 * beside:.0f} us beside another process"
    if beside > alone + TURN:
        raise Failed(f"processes take turns: {found}; {MPS}, or give each party a card (--device cuda:0,cuda:1)")
    return f"processes share it: {found}"


def _between() -> str:
    """Whether each card reads the others' memory, and the rate of the first pair that does."""
    count = torch.cuda.device_count()
    apart = [pair for pair in itertools.permutations(range(count), 2) if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        named = ", ".join(f"cuda:{first} to cuda:{second}" for first, second in apart[:4])
        raise Failed(f"no access from {named}; leave --peer-memory out, or take cards of one switch")
    data = torch.zeros(PINNED_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(data, device="cuda:1")
    rate = PINNED_BYTES / _seconds(lambda: target.copy_(data), "cuda:1")
    return f"all {count} cards reach each other, cuda:0 to cuda:1 at {rate / 1e9:.0f} GB/s"


def _link(placement: str, timeout: float, peer_memory: bool) -> str:
    """What a round takes of three parties there, of steps that are next to nothing else."""
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.settings import split

    settings = {"engine": "wire", "device": placement, "timeout": timeout, "peer_memory": peer_memory}
    with PrivateLlama(*split(settings)) as llama:
        figures, cost = llama.bench(STEPS)
    rounds, seconds = cost.rounds() // STEPS.steps, figures["seconds_per_step"]
    return f"3 processes, {rounds} rounds in {1e3 * seconds:.2f} ms, {1e6 * seconds / rounds:.0f} us each"


def _fits(named: Sequence[str], config: LlamaConfig, tokens: int) -> str:
    """Weights and caches of all parties, where they would be."""
    from crypten_llm.commands.cost import check_fits, predict
    from crypten_llm.commands.options import PADDED_ON_A_GPU
    from crypten_llm.errors import UsageError
    from crypten_llm.session.plan import Plan

    tokens = min(tokens, config.context)
    padded = PADDED_ON_A_GPU if set(named) != {"cpu"} else 0
    held = predict(config, Plan(tokens - 2, 2, padded=padded)).memory
    try:
        check_fits(held, named, memory.left)
    except UsageError as error:
        raise Failed(str(error)) from None
    each = (f"{role} {size(sum(part.values()))}" for role, part in held.items())
    return f"{config.parameters:,} parameters and {tokens:,} tokens fit: {', '.join(each)}"
