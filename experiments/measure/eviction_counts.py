"""What one decode step sends and holds under an eviction policy, counted by engine ``cost``.

Owns the counting for ``eviction_cost``: which part of attention is which, the mean over steps at which
a cluster of the cache fills and steps at which none does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction

from crypten_llm.commands.machine import Machine
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.errors import UsageError
from crypten_llm.links.network import parse_network
from crypten_llm.models.checkpoint import resolve_config
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session import bench
from crypten_llm.session.bench import Shape
from crypten_llm.session.party import Party
from crypten_llm.session.plan import parse_policy

CHOICE = ("selection", "gather", "scatter")  # of rows: similarity and top-k, then their scores, then their weights
ATTENTION = ("scores", "softmax", "values", *CHOICE, "eviction")
NUMBER = 16  # bytes of a cached number at a party: what was opened, and its part of the mask


class SplitEngine(CostEngine):
    """Engine ``cost`` with two operations of a choice counted apart, and with the sizes of what stays in memory.

    cached: by (phase, step of the program), the most numbers in the cache when attention mixed its values. summaries:
    numbers kept beside it, such as clusters' keys.
    """

    def __init__(self, links):
        super().__init__(links)
        self.cached, self.summaries = {}, 0

    def gather_scores(self, choice, scores):
        with self.meter.operation("gather", "gather"):
            return super().gather_scores(choice, scores)

    def scatter_weights(self, choice, weights, count):
        with self.meter.operation("scatter", "scatter"):
            return super().scatter_weights(choice, weights, count)

    def mix(self, weights, values):
        place, held = (self.meter.cell[0], self.meter.where), 2 * values.shape.numel()
        self.cached[place] = max(self.cached.get(place, 0), held)
        return super().mix(weights, values)

    def fixed(self, x, values=False):
        self.summaries += x.shape.numel()
        return super().fixed(x, values)


@dataclass(frozen=True)
class Step:
    """counts: of one decode step of the layers, by (kind, what); what: rounds, bytes online (of both parties) and of
    the dealer (to both), products and material (see ``engines.wire.counted.Links``). cached, summaries: numbers held in
    the cache, and as keys of its clusters.
    """

    counts: Counter
    cached: int
    summaries: int

    def total(self, what: str, kinds=ATTENTION) -> Fraction:
        return sum((found for (kind, name), found in self.counts.items() if name == what and kind in kinds), Fraction())

    def work(self) -> dict[str, float]:
        """What ``seconds`` are predicted from, of the whole step; results keep it, so that they follow ``Machine``."""
        everything = {kind for kind, _ in self.counts}
        return {what: float(self.total(what, everything)) for what in ("rounds", "online", "products", "material")}

    def seconds(self, network: str) -> float:
        return seconds(self.work(), network)


def seconds(work: dict[str, float], network: str) -> float:
    """Predicted, of a step with this ``Step.work``, for parties with a core each whose dealer is ahead of them."""
    return Machine().seconds(work["rounds"], work["online"] / 2, work, parse_network(network))


def shape_of(model: str, tokens: int, offline: bool = False) -> Shape:
    """What ``count`` needs of a model. Raises UsageError for one that it cannot count."""
    config = LlamaConfig.from_folder(resolve_config(model, offline))
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if config.head_dim * heads != config.hidden_size:
        raise UsageError(
            f"head_dim is {config.head_dim}, with {heads} heads and hidden_size {config.hidden_size}; costs are "
            "counted for models whose heads make up hidden_size"
        )
    return Shape(config.hidden_size, heads, config.num_key_value_heads, config.intermediate_size, layers, tokens)


def count(shape: Shape) -> Step:
    """The mean decode step of ``shape``, over as many steps as a cluster takes to fill or an eviction to come round.

    Every layer is counted: policies choose in some and not in others.
    """
    policy = parse_policy(shape.policy)
    if policy.uneven:
        found = layers(shape, policy.period)
        return replace(found, counts=_combined((Fraction(1, policy.period), found.counts)))
    period, plain, filling = fills(shape.policy, shape.kv_len)
    steps = {length: layers(replace(shape, kv_len=length)) for length in {plain, filling}}
    often, once = (Fraction(period - 1, period), steps[plain].counts), (Fraction(1, period), steps[filling].counts)
    return replace(steps[plain], counts=_combined(often, once))


def fills(policy: str, length: int) -> tuple[int, int, int]:
    """(period, plain, filling): a cluster fills once in ``period`` steps. The first step after a prompt of ``filling``
    tokens is such a one, that after ``plain`` tokens is not; both are ``length`` or the next that will do. Of a policy
    whose steps are all unlike, (1, length, length).

    Raises UsageError for a policy of which no prompt's length gives both.
    """
    found = parse_policy(policy)
    if found.uneven or found.period == 1:
        return 1, length, length

    def following(is_filling):
        for prompt in range(length, length + 100_000):
            if found.fills(prompt) == is_filling:
                return prompt
        raise UsageError(
            f"policy {policy} keeps the same rows of every prompt; give what it keeps as a share to count it"
        )

    return found.period, following(False), following(True)


def layers(shape: Shape, steps: int = 1) -> Step:
    """The first step after a prompt of ``shape.kv_len`` tokens; or several in all, from the second on."""
    links, counts = Links(), Counter()
    engine = SplitEngine(links)
    bench.run(Party(engine, links, compute_parties=2), replace(shape, steps=steps), grows=steps > 1)
    for meter in links.meters:
        for row in meter.table():
            if row["phase"] == "decode":
                kind = row["kind"]
                counts[kind, "rounds"] = Fraction(max(counts[kind, "rounds"], row["rounds"]))
                counts[kind, "online"] += Fraction(row["bytes_sent"])
                counts[kind, "dealer"] += Fraction(row["dealer_bytes_received"])
    for (phase, kind), work in links.work.items():
        if phase == "decode":
            for what in ("products", "material"):
                counts[kind, what] += Fraction(work[what])
    cached = sum(held for (phase, _), held in engine.cached.items() if phase == "decode")
    return Step(counts, cached, 0 if parse_policy(shape.policy).rebuilds_cache else engine.summaries)


def _combined(*terms: tuple) -> Counter:
    total = Counter()
    for weight, counts in terms:
        for key, value in counts.items():
            total[key] += weight * value
    return total
