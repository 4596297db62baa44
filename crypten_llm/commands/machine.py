"""What things take a machine, in seconds: the constants of predictions.

Owns the model of three terms, its constants for a processor, and those of the cards in ``cards.json``. They are fitted
to measured runs (``python -m experiments.measure.predicted_seconds``, and ``card_seconds`` for a GPU).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from crypten_llm import files
from crypten_llm.errors import UsageError
from crypten_llm.records import Count, Record, Word

if TYPE_CHECKING:
    from crypten_llm.links.network import Network

CARDS = Path(__file__).with_name("cards.json")
SOCKETS, PEER_MEMORY = "sockets", "peer memory"  # the links of a card's parties
PREFILL, CAPTURED, DEALER = "prefill", "captured", "dealer"  # its sets of constants over each


@dataclass(frozen=True)
class Machine:
    """Seconds that things take a process with a core of its own: a round, its bytes apart (nearly all of it is the
    Python between two openings); a multiplication and addition of two words in a matrix product; a byte of the
    dealer's material, which stands for all element-wise work, at a party and at the dealer.

    The defaults are fitted to decode steps at hidden sizes 64 to 2,048 and to prefill passes of 128 rows of two parties
    with a core each (``python -m experiments.measure.predicted_seconds``); they reproduce each of these within a fifth.
    ``deal`` is what is left of the seconds of a tape of the shipped model. ``narrow``: as ``product``, of two int32,
    from a prompt of 256 tokens in either precision (docs/precision.md). Parties that share cores take longer.
    """

    round: float = 2.35e-4
    product: float = 3.8e-10
    material: float = 1.0e-9
    deal: float = 1.6e-9
    narrow: float = 3.2e-10

    name = "a core a party"
    dealer_waits = False  # for each token of a streamed answer, so that its seconds come on top

    def of(self, phase: str) -> Machine:
        """The constants of a phase."""
        return self

    def seconds(self, rounds: int, sent: int, work: dict, network: Network | None) -> float:
        """Of a party that finds its material ready: on a tape, or from a dealer that is ahead."""
        computed = rounds * self.round + self._products(work) + work["material"] * self.material
        return computed + (network.seconds(rounds, sent) if network else 0.0)

    def dealing(self, rounds: int, work: dict) -> float:
        """Of the dealer, which sends without waiting."""
        return rounds * self.round + self._products(work) + work["material"] * self.deal

    def _products(self, work: dict) -> float:
        return work["products"] * self.product + work.get("narrow", 0) * self.narrow


@dataclass(frozen=True)
class Card:
    """A GPU that all parties compute on: ``other`` is for programs that run from Python, ``decode`` for captured steps,
    ``dealer`` for its part of such steps. memory: bytes.
    """

    name: str
    decode: Machine
    other: Machine
    dealer: Machine
    memory: int
    dealer_waits = True

    def of(self, phase: str) -> Machine:
        return self.decode if phase == "decode" else self.other

    def dealing(self, rounds: int, work: dict) -> float:
        """Of captured steps; while a prefill runs the dealer works along, which its own constants hold."""
        return self.dealer.dealing(rounds, work)

    def from_python(self) -> Card:
        """The same for steps that are not captured."""
        return replace(self, decode=self.other)


PROCESSOR = Machine()


class Constants(Record, frozen=True):
    """Of one set; seconds each, as ``Machine``'s."""

    round: Annotated[float, Meta(ge=0, le=1)]
    product: Annotated[float, Meta(ge=0, le=1e-3)]
    material: Annotated[float, Meta(ge=0, le=1e-3)]

    def machine(self) -> Machine:
        return Machine(self.round, self.product, self.material, self.material)


class Known(Record, frozen=True):
    """A card's constants, by link and set; where the parties were that they were measured with, and what made them."""

    constants: dict[str, dict[str, Constants]]
    device: Word
    memory: Count
    made_by: list[dict[str, Any]] = []


def known() -> dict[str, Known]:
    """The cards of ``cards.json``, by the name that their driver gives them."""
    return files.read_json(CARDS, dict[str, Known])


def card(name: str = "", peer_memory: bool = False) -> Card:
    """The constants of a card of that name, or where none is given those of the first that is known.

    Raises UsageError for a card that was not measured.
    """
    cards = known()
    name = name or next(iter(cards))
    if name not in cards:
        raise UsageError(
            f"nothing is known of how fast {name!r} is; there are constants of {', '.join(cards)}. Measure it: "
            "python -m experiments.measure.card_seconds --save"
        )
    there, link = cards[name], PEER_MEMORY if peer_memory else SOCKETS
    of = {which: constants.machine() for which, constants in there.constants[link].items()}
    label = f"{name}, the parties on {there.device} and {link},"
    return Card(label, of[CAPTURED], of[PREFILL], of[DEALER], there.memory)
