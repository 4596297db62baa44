"""How many truncations go wild: the wire engine's, inside an opening, against CrypTen's, local to each share.

    python -m experiments.measure.truncation --count 1e9 --json runs/truncation.json

A product of two fixed-point numbers has twice the fractional bits, and half of them must go. Factors here are uniform
between half the magnitude and the magnitude, of either sign. Two parties that each divide their share
by 2^f (CrypTen's way) are wrong by 2^(64 - f) units whenever the shares wrapped, which happens with probability
|product| 2^(2f) / 2^64. The wire engine opens the product under a mask and accounts for the wrap.

Three threads run the wire protocol itself, messages and dealer included; both ways truncate the same shares.
A result is wild when it is a whole unit or more from the exact quotient (for CrypTen's: two units).
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import Secret, as_secret
from crypten_llm.roles import CLIENT, DEALER, OWNER, role_names
from experiments.tools import kept
from experiments.tools.command import command

BLOCK = 1 << 19
ROLES = role_names(2)


def factors(generator, count: int, magnitude: float, fraction: int) -> torch.Tensor:
    """Fixed-point numbers with |x| between magnitude / 2 and magnitude."""
    top = int(magnitude * 2**fraction)
    size = generator.integers(top // 2, top, count, endpoint=True)
    return torch.from_numpy(np.where(generator.integers(0, 2, count, dtype=bool), size, -size))


def local_truncation(share: torch.Tensor, fraction: int) -> torch.Tensor:
    """What each of CrypTen's two parties does."""
    return share.div(2**fraction, rounding_mode="trunc")


class Experiment:
    """The counts so far, filled by three threads."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.count = int(arguments.count)
        self.wild = {"wire": 0, "crypten": 0}
        self.largest_error = 0.0  # of the wire engine's results, in units
        self._to_client: queue.Queue = queue.Queue(2)
        self._to_owner: queue.Queue = queue.Queue(2)

    def blocks(self):
        for start in range(0, self.count, BLOCK):
            yield min(BLOCK, self.count - start)

    def truncate(self, runtime, share):
        """The wire engine's: one opening, then the shares modulo 2^64 that it stands for."""
        bits = int(self.arguments.magnitude**2).bit_length()
        f = self.arguments.fraction_bits
        (wire,) = Rounds(runtime).open(Opening(Secret(share, 2 * f, 64, bits), truncate=f, lifted=64))
        return as_secret(runtime, wire).share

    def owner(self, runtime):
        magnitude, f = self.arguments.magnitude, self.arguments.fraction_bits
        generator = np.random.default_rng(self.arguments.seed)
        with tqdm(total=self.count, unit="truncation", unit_scale=True) as bar:
            for size in self.blocks():
                product = factors(generator, size, magnitude, f) * factors(generator, size, magnitude, f)
                mine = torch.from_numpy(generator.integers(-(2**63), 2**63, size))
                theirs = product - mine
                self._to_client.put(theirs)
                error = (self.truncate(runtime, mine) + self._to_owner.get() << f) - product
                self.wild["wire"] += int((error.abs() >= 2**f).sum())
                self.largest_error = max(self.largest_error, int(error.abs().max()) / 2**f)
                error = local_truncation(mine, f) + local_truncation(theirs, f) - (product >> f)
                self.wild["crypten"] += int((error.abs() > 2).sum())
                bar.update(size)

    def client(self, runtime):
        for _ in self.blocks():
            self._to_owner.put(self.truncate(runtime, self._to_client.get()))

    def dealer(self, runtime):
        for size in self.blocks():
            self.truncate(runtime, shape_only((size,)))

    def run(self) -> dict:
        sockets = [{} for _ in ROLES]
        for low, high in ((0, 1), (0, 2), (1, 2)):
            sockets[low][high], sockets[high][low] = socket.socketpair()
        errors = []

        @torch.inference_mode()
        def play(role):
            transport = Transport(role, ROLES, sockets[role])
            try:
                runtime = roles.make(transport)
                (self.owner, self.client, self.dealer)[role](runtime)
                runtime.end()
                transport.close()
            except BaseException as error:
                errors.append(error)
                transport.abort("failed")

        threads = [threading.Thread(target=play, args=(role,), daemon=True) for role in (OWNER, CLIENT, DEALER)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(1)
        if errors:
            raise errors[0]
        mean = (0.75 * self.arguments.magnitude) ** 2
        return {
            "truncations": self.count,
            "magnitude": self.arguments.magnitude,
            "fraction_bits": self.arguments.fraction_bits,
            "wild_wire": self.wild["wire"],
            "wild_crypten": self.wild["crypten"],
            "expected_crypten": round(self.count * mean * 2.0 ** (2 * self.arguments.fraction_bits - 64), 1),
            "largest_error_wire_units": round(self.largest_error, 6),
        }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=float, default=1e8)
    parser.add_argument("--magnitude", type=float, default=1000.0)
    parser.add_argument("--fraction-bits", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = Experiment(arguments).run()
    print(json.dumps(result))
    kept.save(arguments.json, result)


if __name__ == "__main__":
    sys.exit(main())
