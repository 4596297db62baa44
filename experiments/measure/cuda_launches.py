"""How many launches a norm and a softmax of one decode step ask of a party's GPU. Needs none.

    python -m experiments.measure.cuda_launches

They run on the processor, and what would be launched is counted: every operation of torch that computes something, and
for every kernel as many launches as its programs in Triton have. A party's own random bytes are not counted (a launch a
draw), nor copies of arguments that are in several pieces.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crypten_llm.insecure.one_process import run_roles
from crypten_llm.kernels import cpu
from crypten_llm.links.transport import Transport
from crypten_llm.protocols import norm, softmax
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.rounds import Protocol, Rounds
from crypten_llm.protocols.secret import Secret
from crypten_llm.roles import DEALER
from experiments.tools.command import command
from experiments.tools.tables import print_table

HIDDEN, HEADS, PAST = 576, 9, 512  # SmolLM2-135M's
SEVERAL = {"compare": 5, "xor_rows": 2}  # kernels of more than one launch
PARTIES = ("owner", "client")


class Launches(TorchDispatchMode):
    """A with block in which a party's launches are counted, by what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_views = any(given.alias_info and not given.alias_info.is_write for given in func._schema.returns)
        if not (self._in_kernel or of_views or "empty" in func.__name__):
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """In which one kernel does what it does."""
        self.found[name] += SEVERAL.get(name, 1)
        self._in_kernel = True
        yield
        self._in_kernel = False


class Counted:
    """The processor's kernels, each counted as a GPU's."""

    KeyStream = cpu.KeyStream

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def __getattr__(self, name: str) -> Callable:
        def kernel(*given: Any) -> Any:
            with self._launches.kernel(name):
                return getattr(cpu, name)(*given)

        return kernel


def of_norm(runtime: Runtime) -> Protocol[norm.Rows]:
    shares = runtime.public(torch.randint(-(2**20), 2**20, (1, HIDDEN)))
    return norm.unit_rows(runtime, Secret(shares, 12, 33, 10), 1e-5, 8, 16, 40)


def of_softmax(runtime: Runtime) -> Protocol[softmax.Rows]:
    scores = runtime.public(torch.randint(-(2**10), 2**10, (HEADS * PAST,)))
    counts = torch.full((HEADS,), PAST)
    return softmax.weigh(runtime, scores, 14, counts, softmax.Exponents(), 18, 40)


def counted(what: Callable[[Runtime], Protocol]) -> list[Counter[str]]:
    """The owner's launches, and the client's, the second time, when constants are where they stay."""

    def run(transport: Transport) -> Counter[str]:
        runtime = roles.make(transport)
        rounds, launches = Rounds(runtime), Launches()
        for again in range(2):
            runtime.begin(f"{again}")
            asked = what(runtime)
            if again and transport.rank != DEALER:
                runtime.kernels = Counted(launches)  # type: ignore[assignment]
                with launches:
                    rounds.run(asked)
            else:
                rounds.run(asked)
            runtime.end()
        return launches.found

    return run_roles(run, timeout=60.0)[:DEALER]


@command
def main() -> None:
    argparse.ArgumentParser(prog="cuda_launches", description=__doc__).parse_args()
    rows: list[dict] = []
    for name, what in ((f"norm of {HIDDEN}", of_norm), (f"softmax, {HEADS} rows of {PAST}", of_softmax)):
        for party, found in zip(PARTIES, counted(what), strict=True):
            kernels = {each: count for each, count in found.items() if hasattr(cpu, each)}
            most = ", ".join(f"{each} {count}" for each, count in Counter(kernels).most_common(5))
            in_torch = found.total() - sum(kernels.values())
            rows.append(dict(of=name, party=party, launches=found.total(), in_torch=in_torch, mostly=most))
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
