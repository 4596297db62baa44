"""What a pass of one group costs, by what is in it: seconds as the command ``cost`` predicts them.

Owns the table. Its constants are those of ``commands.machine.Machine``, fitted to measured runs
(``experiments.measure.predicted_seconds``).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from crypten_llm.commands.cost import count_bench, predict
from crypten_llm.commands.machine import Machine
from crypten_llm.links.network import Network
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan

ROUND = Machine(1.0, 0.0, 0.0, 0.0)  # counts rounds alone


@dataclass(frozen=True)
class Pass:
    """seconds: of a compute party that finds its material ready. dealing: of the dealer. material: bytes that it
    deals, to both parties. shared: of ``seconds``, those of rounds, which a pass has once whatever is in it.
    """

    seconds: float
    dealing: float
    material: float
    shared: float

    def beside(self, other: Pass) -> Pass:
        """Both in one pass."""
        return Pass(
            self.seconds + other.seconds - min(self.shared, other.shared),
            self.dealing + other.dealing,
            self.material + other.material,
            max(self.shared, other.shared),
        )

    def times(self, ratio: float) -> Pass:
        """The same where everything takes so many times as long."""
        return Pass(ratio * self.seconds, ratio * self.dealing, self.material, ratio * self.shared)


NOTHING = Pass(0.0, 0.0, 0.0, 0.0)


class Costs:
    """steps[b - 1]: a token of b sequences. prompts: the whole prefill, by tokens: of a chunk's multiples, and of one
    token more, which takes a pass more. chunk: tokens of a prompt in a pass.
    """

    def __init__(self, steps: list[Pass], prompts: dict[int, Pass], chunk: int) -> None:
        self.steps, self.chunk = steps, chunk
        self._prompts = {0: NOTHING, **dict(sorted(prompts.items()))}
        self._lengths = list(self._prompts)

    def scaled(self, step: float, prompt: float) -> Costs:
        """The same where steps and prompts take so many times as long."""
        prompts = {tokens: each.times(prompt) for tokens, each in self._prompts.items() if tokens}
        return Costs([each.times(step) for each in self.steps], prompts, self.chunk)

    @property
    def room(self) -> int:
        return len(self.steps)

    @property
    def longest(self) -> int:
        return self._lengths[-1]

    def step(self, sequences: int) -> Pass:
        return self.steps[sequences - 1] if sequences else NOTHING

    def part(self, begin: int, end: int) -> Pass:
        """Of a prompt, the tokens from ``begin`` to ``end``, which are one chunk at most."""
        before, after = self._until(begin), self._until(end)
        shared = self.steps[0].shared
        return Pass(
            after.seconds - before.seconds,
            after.dealing - before.dealing,
            after.material - before.material,
            min(shared, after.seconds - before.seconds),
        )

    def alone(self, prompt: int, answer: int) -> float:
        """Seconds of a request that nobody is beside: what is promised as its price."""
        return self._until(prompt).seconds + (answer - 1) * self.steps[0].seconds

    def _until(self, tokens: int) -> Pass:
        """Of a prompt of so many tokens, linear between the counted lengths."""
        at = bisect_left(self._lengths, tokens)
        high = self._lengths[at]
        if high == tokens:
            return self._prompts[high]
        low = self._lengths[at - 1]
        share = (tokens - low) / (high - low)
        a, b = self._prompts[low], self._prompts[high]
        mixed = (x + share * (y - x) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
        return Pass(*mixed)


def counted(shape: Shape, longest: int, room: int, chunk: int, network: Network | None) -> Costs:
    """Of a model of these sizes, whose prompts have up to ``longest`` tokens. ``shape.kv_len``: the cached tokens of a
    step. Takes a second or two.
    """
    steps = []
    for sequences in range(1, room + 1):
        cost = count_bench(replace(shape, sequences=sequences, steps=1))
        rows = [row for row in cost.table() if row["phase"] == "decode"]
        rounds, sent = cost.rounds(("decode",)), max(cost.bytes_sent(("decode",)))
        waited = network.seconds(rounds, sent) if network else 0.0
        shared = rounds * Machine().round + (network.seconds(rounds, 0) if network else 0.0)
        material = cost.dealer_bytes(("decode",))
        seconds = sum(row["seconds"] for row in rows) + waited
        # A byte of material costs the dealer as much in any pass: its share of what ``predict`` says of a step.
        steps.append(Pass(seconds, 0.0, material, shared))
    config = replace(shape, kv_len=longest + room).config()
    prompts, rate = {}, 0.0
    lengths = {tokens + more for tokens in range(0, longest, chunk) for more in (1, chunk)}
    for tokens in sorted({min(tokens, longest) for tokens in lengths}):
        found = predict(config, Plan(tokens, 2, chunk), network)
        phase, step = found.phase("prefill"), found.phase("decode")
        rate = step["dealer_seconds"] / step["dealer_bytes"]
        prompts[tokens] = Pass(phase["seconds"], phase["dealer_seconds"], phase["dealer_bytes"], steps[0].shared)
    steps = [replace(step, dealing=step.material * rate) for step in steps]
    return Costs(steps, prompts, chunk)
