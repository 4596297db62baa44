"""What security against malicious parties would cost on the present protocols: counted, nothing of it is built.

    python -m experiments.measure.authentication --model FILE.gguf --prompt-tokens 512
    python -m experiments.measure.authentication --hidden 4096 --heads 32 --ffn 11008 --layers 32 --prompt-tokens 2048

Engine ``cost`` runs the program and says, for each opening and each dealt number, how many bits it has. This charges
them again as MACs in the manner of SPDZ2k (Cramer et al., CRYPTO 2018) would, s = 40 bits of statistical security:

- A number modulo 2^n lives modulo 2^(n + s), with a MAC as wide. Dealt, it is 2 (n + s) bits in the place of n.
- An opening of n bits has n + s each way. Parts of a mask come from streams, the MAC of it is dealt: n + s bits.
- Low bits cannot be dropped from shares, as a rounded share has no MAC. Those d bits are opened too, and a mask without
  them is dealt: d bits more each way, d + 2 (n + s) more of the dealer's.
- Bits that are shared by xor have a MAC of s bits each, dealt; they are opened as they are.
- 2^256 - 1 is divisible by 3, so a MAC modulo it would miss one error in three. 2^521 - 1 is prime. What 40 bits
  of a weight, or 168 of a row's sum, are cut from is opened whole.
- A comparison key carries its payloads and their MACs, modulo 2^(n + s). Its seeds stay.
- The word of flags, the sketch and what one party sends alone stay: they are checks, or hold uniform words.
- Before logits are shown, one check of all MACs: a coin and a tag, each committed to and opened.

Products with the owner's weights become products with W - R, known to both, and with R, which is dealt with its MAC
when the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from crypten_llm.commands.verbs import cost as verb
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.protocols import ladder, norm
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.session import generation
from crypten_llm.session.messages import Announced
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from experiments.tools.command import command

SECURITY = 40  # s
PRIME = 521  # 2^PRIME - 1 is prime
COUNTED = ("online", "online mac", "dealt", "dealt mac")
CHECK = 4  # rounds of a check of all MACs
WINDOW, SUM = 40, 168  # bits that are opened of a weight and of a row's sum
FACTORS, ROOT = norm.FACTORS, norm.ROOT


class Authenticated(Counting):
    """Counts as ``Counting`` does, and what MACs would make of it, in bits: by (phase, kind), "online" of a party each
    way, "dealt" of the dealer to both, each as it is and "mac".
    """

    def __init__(self, links: Any, material: Any) -> None:
        super().__init__(links, material)
        self.bits: dict[tuple[str, str], Counter] = {}
        self._mask: tuple[int, int] | None = None  # of the opening that is being prepared: numbers, bits

    def note(self, what: str, now: float, mac: float, cell: tuple[str, str] | None = None) -> None:
        counted = self.bits.setdefault(cell or self.transport.meter.cell, Counter())
        counted[what] += now * self.transport.times
        counted[f"{what} mac"] += mac * self.transport.times

    def mask(self, shape: Sequence[int], bits: int = 64) -> Any:
        count = math.prod(shape)
        self._mask = count, bits
        self.note("dealt", 0, count * (SECURITY if bits == 1 else bits + SECURITY))
        return super().mask(shape, bits)

    def mask_ones(self, shape: Sequence[int], bits: int) -> Any:
        self.note("dealt", 0, math.prod(shape) * PRIME)
        return super().mask_ones(shape, bits)

    def mask_below(self, shape: Sequence[int], modulus: int) -> Any:
        self.note("dealt", 0, math.prod(shape) * ((modulus - 1).bit_length() + SECURITY))
        return super().mask_below(shape, modulus)

    def drop(self, share: Any, count: int) -> Any:
        if count:
            size = share.numel()
            left = self._mask[1] if self._mask and self._mask[0] == size else 64
            self.dropped(size, count, left)
        return super().drop(share, count)

    def dropped(self, size: int, count: int, left: int) -> None:
        """``count`` bits that cannot be dropped from shares of ``size`` numbers, of which ``left`` bits stay."""
        self.note("online", 0, size * count)
        self.note("dealt", 0, size * (count + 2 * (left + SECURITY)))

    def deal(self, shape: Sequence[int], value: Any, bits: int = 64) -> Any:
        count = math.prod(shape)
        self.note("dealt", count * bits, 2 * count * (bits + SECURITY))
        return super().deal(shape, value, bits)

    def deal_ones(self, shape: Sequence[int], bits: int, turned: Any) -> Any:
        """Of scores [n], whose windows are opened whole, or of rows [2, R], whose sums lose their low bits."""
        count = math.prod(shape)
        self.note("dealt", count * bits, 2 * count * PRIME)
        if len(shape) == 1:
            self.dropped(count, PRIME - WINDOW, WINDOW)
        else:
            self.dropped(shape[1], PRIME - SUM, SUM)
        return super().deal_ones(shape, bits, turned)

    def deal_table(self, shape: Sequence[int], bits: int, turned: Any) -> Any:
        """Bytes hold bits that are shared by xor, and words of 64 bits belong to checks."""
        count = math.prod(shape) * bits
        self.note("dealt", count, count * (1 + SECURITY) if bits == 8 else count)
        return super().deal_table(shape, bits, turned)

    def deal_common(self, sizes: Any, value: Any) -> Any:
        """``keyed`` adds what payloads become."""
        count = 16 * sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)
        self.note("dealt", count, count)
        return super().deal_common(sizes, value)

    def keyed(self, comparison: Any, count: int) -> None:
        """``count`` comparison keys, to both parties."""
        group = comparison.group
        numbers = 2 * count * group.count * (comparison.levels + len(comparison.leaves))
        self.note("dealt", 0, numbers * (2 * (group.bits + SECURITY) - group.bits))

    def exchange(self, pieces: Any) -> Any:
        for piece in pieces:
            count = math.prod(piece.shape)
            now = mac = count * piece.bits
            if piece.sender is not None:
                now = mac = now / 2  # a party's, on average
            elif piece.modulus == 2**piece.bits - 1:
                mac = count * PRIME
            elif piece.bits > 1:
                mac = count * (piece.bits + SECURITY)
            self.note("online", now, mac, piece.cell)
        return super().exchange(pieces)


class AuthenticatedEngine(CostEngine):
    """Engine ``cost`` over that role."""

    role = Authenticated


@contextmanager
def noting() -> Iterator[None]:
    """While it lasts, drops and keys that the dealer's program passes over are noted too."""
    below, normalized, times, root = ladder.below, norm.normalized, norm._times, norm._inverse_root

    def noted_below(runtime: Any, comparison: Any, raw: Any, mask: Any, *rest: Any) -> Any:
        runtime.keyed(comparison, mask.shape[0])
        return below(runtime, comparison, raw, mask, *rest)

    def noted_times(runtime: Any, x: Any, roots: Any, bits: int, cut: int) -> Any:
        runtime.dropped(x.shape.numel(), cut, bits - cut)
        return times(runtime, x, roots, bits, cut)

    def noted_root(runtime: Any, total: Any, power: Any, fit: Any) -> Any:
        runtime.dropped(power.shape.numel(), 2 * FACTORS - ROOT, power.bits - 2 * FACTORS + ROOT)
        return root(runtime, total, power, fit)

    def noted_normalized(runtime: Any, raw: Any, mask: Any, shape: Any, width: int, top: int, *rest: Any) -> Any:
        runtime.dropped(math.prod(shape), top - FACTORS, width - top + FACTORS)
        return normalized(runtime, raw, mask, shape, width, top, *rest)

    functions = {
        (ladder, "below"): noted_below,
        (norm, "_times"): noted_times,
        (norm, "_inverse_root"): noted_root,
        (norm, "normalized"): noted_normalized,
    }
    before = {place: getattr(*place) for place in functions}
    try:
        for place, function in functions.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


@torch.inference_mode()
def count(config: Any, prompt_tokens: int) -> dict:
    """By phase ("prefill", "decode" of one token, "load") and operation: bytes now and with MACs; rounds."""
    links = Links()
    there: Any = links
    engine = AuthenticatedEngine(links)
    party = Party(engine, there, compute_parties=2)
    links.say(Announced(config.to_dict(), {}))
    with noting():
        party.load()
        party.start_request()
        for _ in generation.run(party, Plan(prompt_tokens, 2), cache=party.model.new_cache()):
            pass
    found: dict = {}
    for (phase, kind), counted in engine.runtime.bits.items():
        found.setdefault(phase, {})[kind] = {what: round(counted[what] / 8) for what in COUNTED}
    matrices = [m.shape.numel() for weight in party.model.parameters() for m in weight.matrices.values()]
    rounds = {phase: sum(r["rounds"] for r in links.meters[0].table() if r["phase"] == phase) for phase in found}
    return {"operations": found, "rounds": rounds, "weights": 2 * sum(matrices) * (64 + SECURITY) // 8}


def totals(operations: dict) -> dict:
    """Of a phase."""
    return {what: sum(counted[what] for counted in operations.values()) for what in COUNTED}


@command
def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--config", default="")
    for name in verb._SIZES:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    given.offline, given.public_prefix, given.new_tokens = True, 0, 2
    made = count(verb._config(given), given.prompt_tokens)
    if given.json:
        print(json.dumps(made))
        return 0
    for phase in ("prefill", "decode"):
        print(f"{phase}: {made['rounds'][phase]} rounds, {made['rounds'][phase] + CHECK} with a check of MACs")
        print(f"  {'MB':12}", *(f"{what:>11}" for what in COUNTED))
        rows = {**made["operations"][phase], "total": totals(made["operations"][phase])}
        for kind, counted in rows.items():
            print(f"  {kind:12}", *(f"{counted[what] / 1e6:11.2f}" for what in COUNTED))
    print(f"load: {made['weights'] / 1e9:.2f} GB more of the dealer's, of the weights' masks and their MACs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
