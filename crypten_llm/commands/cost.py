"""What a request will cost on engine ``wire``, from a model's sizes alone: no weights, no parties, in seconds.

Owns the prediction. Rounds and bytes are counted (see ``engines.wire.counted``) and exact; memory is that of weights
and cache; seconds come from a model of three terms, and are an estimate.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm import memory
from crypten_llm.commands.machine import PROCESSOR, Card, Machine
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.engines.wire.handles import Rows
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import UsageError
from crypten_llm.links.network import Network
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.protocols.products import NARROW
from crypten_llm.protocols.secret import Secret
from crypten_llm.roles import role_names
from crypten_llm.session import bench, generation, scheduler
from crypten_llm.session.api import check_policy
from crypten_llm.session.fits import by_role
from crypten_llm.session.messages import Announced
from crypten_llm.session.mode import Mode
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Course, Plan, Turn, parse_policy
from crypten_llm.session.producing import Known
from crypten_llm.session.report import ONLINE, WAYS, Cost, added
from crypten_llm.session.thin import Side
from crypten_llm.session.thin_count import CountedSide

if TYPE_CHECKING:
    from crypten_llm.models.cache import KVCache
    from eviction.operations import Handle


WORD = 8


@dataclass(frozen=True)
class Prediction:
    """cost: counters as a run's report has them, with predicted seconds, and on what machine. memory: bytes of weights
    and of the cache after the last token, by role. decode_steps: steps after the prefill. dealing: seconds of the
    dealer, by phase. thin: bytes that a thin client sends and receives, by phase, where there is a helper.
    """

    cost: Cost
    memory: dict[str, dict[str, int]]
    decode_steps: int
    dealing: dict[str, float]
    plan: Plan
    machine: Machine | Card
    thin: dict[str, tuple[int, int]] = field(default_factory=dict)

    def phase(self, name: str, share: int = 1) -> dict:
        """Figures of a phase, or of the mean of its ``share`` steps: the cache grows from step to step."""
        table = [row for row in self.cost.table() if row["phase"] == name]
        return {
            "rounds": self.cost.rounds((name,)) // share,
            "bytes_sent": [sent // share for sent in self.cost.bytes_sent((name,))],
            "dealer_bytes": self.cost.dealer_bytes((name,)) // share,
            "seconds": sum(row["seconds"] for row in table) / share,
            "dealer_seconds": self.dealing.get(name, 0.0) / share,
        }

    def to_dict(self) -> dict:
        """The JSON object that ``cost --json`` prints."""
        found = {"load": self.phase("load"), "prefill": self.phase("prefill")}
        if self.decode_steps:
            found |= {"decode": self.phase("decode"), "per_token": self.phase("decode", self.decode_steps)}
        if self.thin:
            found["thin_client"] = {name: dict(zip(WAYS, each, strict=True)) for name, each in self.thin.items()}
        facts = {"engine": "wire", "plan": self.plan.facts(), "machine": self.machine.name}
        return {**facts, **found, "memory": self.memory, "table": self.cost.table()}


class _AlikeLayers(Llama):
    """Counts the second layer for all that are like it, which are skipped.

    That is exact: a layer's messages depend on shapes alone. Its material may begin in a frame that the layer before
    left unfinished, which is why the first layer, after the embedding, is not the model for the others.
    """

    def __init__(self, links: Links, *arguments: Any) -> None:
        self.links = links
        super().__init__(*arguments)

    def through(self, index: int, x: Handle, *rest: Any) -> Handle:
        if index > 1:
            return x
        self.links.times = len(self.blocks) - 1 if index == 1 else 1
        try:
            return super().through(index, x, *rest)
        finally:
            self.links.times = 1


@torch.inference_mode()
def predict(
    config: LlamaConfig,
    plan: Plan,
    network: Network | None = None,
    machine: Machine | Card = PROCESSOR,
    helper: bool = False,
    from_stock: bool = False,
    precision: str = "default",
) -> Prediction:
    """What ``plan`` costs with a model of this configuration, by that preset. A stop token may end an answer earlier.
    helper: for a thin client. from_stock: with material that was dealt before (``protocols.dealer.stock``).

    The load's bytes leave out the norms' scales, which are the weights' secret until the owner tells them.

    Raises UsageError for a plan that the model cannot run.
    """
    side = CountedSide() if helper else None
    links, party, alike = _loaded(config, [plan], precision, side=side, dealer_follows=not from_stock)
    counted = _entries(links, machine, network)
    cache = party.model.new_cache()
    party.start_request()
    for _ in generation.run(party, plan, cache=cache):
        pass
    for entry, later in zip(counted, _entries(links, machine, network), strict=True):
        entry["table"] += later["table"]
    cost = Cost(counted, len(counted))
    memory = _memory(party.model, cache, alike)
    thin = side.client_bytes(plan, config.vocab_size) if side else {}
    if side:
        memory = {"helper" if role == "client" else role: held for role, held in memory.items()}
    return Prediction(cost, memory, plan.max_new_tokens - 1, _dealing(links, cost, machine), plan, machine, thin)


def check_fits(held: Mapping[str, Mapping[str, int]], named: Sequence[str], left: Callable[[str], int]) -> None:
    """Raises UsageError where weights and caches are more than a device has for the roles that are on it.

    held: a prediction's memory. named: a device for all roles, or one for each. left: bytes of a device.
    """
    placed = dict(zip(held, named if len(named) > 1 else [named[0]] * len(held), strict=True))
    for device in dict.fromkeys(placed.values()):
        needed = {rank: sum(held[role].values()) for rank, role in enumerate(held) if placed[role] == device}
        what = f"weights and caches{by_role(needed, 2)}"
        memory.check(sum(needed.values()), what, device, left(device))


@torch.inference_mode()
def predict_open(
    config: LlamaConfig,
    courses: Sequence[Course],
    room: int,
    network: Network | None = None,
    machine: Machine | Card = PROCESSOR,
    precision: str = "default",
) -> Prediction:
    """What ``courses`` cost in an open batch that nobody else joins, in which so many at a time have ``room``. A stop
    token may end an answer earlier. Memory is left out.

    Raises: as ``predict``.
    """
    plans = [course.plan for course in courses]
    links, party, _ = _loaded(config, plans, precision, [course.cached_tokens for course in courses])
    coming = [scheduler.Newcomer(each.plan, _gone_through(party, number, each)) for number, each in enumerate(courses)]

    class Door:
        def newcomers(self, inside: int) -> list[scheduler.Newcomer]:
            found = coming[: max(0, room - inside)]
            del coming[: len(found)]
            return found

        def dropped(self) -> tuple[int, ...]:
            return ()

    party.start_request()
    door = Door()
    for _ in scheduler.follow(party, door.newcomers(0), door):
        pass
    entries = _entries(links, machine, network)
    cost = Cost(entries, len(entries))
    steps = max(plan.max_new_tokens for plan in plans) - 1
    return Prediction(cost, {}, steps, _dealing(links, cost, machine), plans[0], machine)


@torch.inference_mode()
def predict_turns(
    config: LlamaConfig,
    courses: Sequence[Course],
    network: Network | None = None,
    machine: Machine | Card = PROCESSOR,
    precision: str = "default",
) -> Prediction:
    """What ``courses`` cost a thin client's parties, one after another. A stop token may end an answer earlier. Memory
    and the client's own bytes are left out.

    Raises: as ``predict``.
    """
    plans = [course.plan for course in courses]
    links, party, _ = _loaded(config, plans, precision, [course.cached_tokens for course in courses], CountedSide())
    turns = [_gone_through(party, number, each) for number, each in enumerate(courses)]
    entries, dealing = list[dict](), Counter[str]()
    for plan, turn in zip(plans, turns, strict=True):
        party.start_request()
        for _ in generation.together(party, [plan], turns=[turn]):
            pass
        counted = _entries(links, machine, network)
        dealing.update(_dealing(links, Cost(counted, 2), machine))
        entries = added(entries, counted)
    steps = sum(plan.max_new_tokens - 1 for plan in plans)
    return Prediction(Cost(entries, 2), {}, steps, dict(dealing), plans[0], machine)


def _gone_through(party: Party, number: int, course: Course) -> Turn | None:
    """Where a request stands in a conversation of this number, whose cache is filled here."""
    if course.behind is None:
        return None
    party.kept[number] = cache = party.model.new_cache()
    party.start_request()
    for _ in generation.run(party, course.behind, cache=cache):
        pass
    return Turn(number, cache.length, keeps_answer=not course.plan.hide_length)


class _Uncounted(Party):
    """Has nobody to ask for counters."""

    def count(self, ended: Sequence[int]) -> list[dict]:
        return []


def _loaded(
    config: LlamaConfig,
    plans: Sequence[Plan],
    precision: str,
    cached: Sequence[int] = (),
    side: Side | None = None,
    dealer_follows: bool = True,
) -> tuple[Links, Party, bool]:
    """Where ``plans`` are counted, the model loaded; whether the first two layers stand for all. cached: tokens that
    each goes on after.

    Raises UsageError for a plan that the model cannot run.
    """
    for plan, behind in zip(plans, cached or [0] * len(plans), strict=True):
        for name, count in (("new_tokens", plan.max_new_tokens), ("chunk", plan.chunk)):
            if count < 1:
                raise UsageError(f"{name} is {count}; it must be 1 or more")
        check_policy(plan.policy)
        plan.check(config, Turn(0, behind, keeps_answer=False) if behind else None)
    links = Links(dealer_follows)
    differ = any(parse_policy(plan.policy).acts for plan in plans) or len(set(config.windows)) > 1
    make_model = Llama if differ else functools.partial(_AlikeLayers, links)
    there: Any = links  # stands for a transport
    mode = Mode.parse(plans[0].reveal)
    given: dict[str, Any] = {"compute_parties": 2, "make_model": make_model, "mode": mode, "stocked": Known()}
    engine = CostEngine(links, mode.wire(precision))
    for plan in plans:
        engine.check_policy(parse_policy(plan.policy))
    party = _Uncounted(engine, there, side=side, **given)
    links.say(Announced(config.to_dict(), {}, series="" if dealer_follows else "counted"))
    party.load()
    return links, party, not differ


def _dealing(links: Links, cost: Cost, machine: Machine | Card) -> dict[str, float]:
    return {phase: machine.dealing(cost.rounds((phase,)), _work_of(links, phase)) for phase in ONLINE}


@torch.inference_mode()
def count_bench(shape: bench.Shape, machine: Machine | Card = PROCESSOR, precision: str = "default") -> Cost:
    """What ``bench`` of this shape counts, in all its steps."""
    links = Links()
    there: Any = links  # stands for a transport
    bench.run(Party(CostEngine(links, WireConfig.of(precision)), there, compute_parties=2), shape)
    entries = _entries(links, machine, None)
    return Cost(entries, len(entries))


def _entries(links: Links, machine: Machine | Card, network: Network | None) -> list[dict]:
    """The compute parties' counters so far, as ``Party.statistics`` gives them, with predicted seconds."""
    entries = []
    for rank, meter in enumerate(links.meters):
        table = meter.table()
        for row in table:
            work = links.work[row["phase"], row["kind"]]
            row["seconds"] = machine.of(row["phase"]).seconds(row["rounds"], row["bytes_sent"], work, network)
        entries.append({"rank": rank, "table": table})
    return entries


def _work_of(links: Links, phase: str) -> dict:
    works = [work for (where, _), work in links.work.items() if where == phase]
    return {what: sum(work[what] for work in works) for what in ("products", "narrow", "material")}


def _memory(model: Llama, cache: KVCache, alike: bool) -> dict[str, dict[str, int]]:
    """Bytes by role. A weight is 32-bit integers at the owner, or floats that no layer has taken in, and a word
    elsewhere, half of one in a ring of 32 bits; a cached number is two words at a party, what was opened and the part
    of its mask, and one at the dealer; so are the rows that a policy keeps beside the cache, such as those that stand
    for its blocks. A share that it keeps is one word. Room to grow is not counted. alike: whether the first two layers
    stand for all, of which the others were skipped.
    """
    layers = cache.layers[:2] if alike else cache.layers
    parts = [part for layer in layers for part in layer.parts]
    rows = sum(rows.shape.numel() for part in parts for rows in (part.keys, part.values))
    rows = rows * len(cache.layers) // len(layers)
    notes = [note for part in parts for note in part.layer.notes.values()]
    rows += sum(note.shape.numel() for note in notes if isinstance(note, Rows))
    shares = sum(note.shape.numel() for note in notes if isinstance(note, Secret))
    weights = list(model.parameters())
    matrices = [matrix for weight in weights for matrix in weight.matrices.values()]
    operands = sum(matrix.shape.numel() for matrix in matrices)
    hidden = sum(matrix.shape.numel() * (WORD // 2 if matrix.bits <= NARROW else WORD) for matrix in matrices)
    plain = sum(weight.shape.numel() for weight in weights if len(weight.shape) == 1 or not weight.matrices)
    owner, client, dealer = role_names(2)
    return {
        owner: {"weights": 4 * operands + 4 * plain, "cache": WORD * (2 * rows + shares)},
        client: {"weights": hidden, "cache": WORD * (2 * rows + shares)},
        dealer: {"weights": hidden, "cache": WORD * (rows + shares)},
    }
