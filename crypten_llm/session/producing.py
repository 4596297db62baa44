"""A dealer that deals blocks for a stock: the material of one request after another, before there is any.

Owns a dealer's program that knows the weights' masks of one series, and keeps them, so that a block costs its own
material alone. Nobody is at its other ends: what it would hear is public, and known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.links.meter import Meter
from crypten_llm.links.signatures import Signer
from crypten_llm.links.staging import Staging
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.manifest import make_manifest
from crypten_llm.protocols.dealer.randomness import fresh_key
from crypten_llm.protocols.dealer.recording import Recording, Sizes
from crypten_llm.protocols.dealer.roles import Dealer
from crypten_llm.roles import DEALER
from crypten_llm.session import generation
from crypten_llm.session.messages import Announced
from crypten_llm.session.mode import Mode
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.stocked import Stocked
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.protocols.dealer.runtime import Piece
    from crypten_llm.session.series import Series


class Absent:
    """Links to parties that are not there: what they would say is known, and nothing is sent to them."""

    rank = DEALER

    def __init__(self, script: Iterator[Any]) -> None:
        self.meter = Meter()
        self._script = script

    def announce(self, source: int, peers: Any, message: Any, kind: Any = dict, timeout: float | None = None) -> Any:
        return next(self._script)

    def passed(self, pieces: list[Piece]) -> None:
        pass


class _Nothing(Sizes):
    """Where nothing may go: sharing weights takes no material."""

    def write(self, party: int, data: torch.Tensor) -> None:
        raise AssertionError("weights are shared without the dealer's material")


class Known(Stocked):
    """Where nobody has to be told how the weights are masked. masks: the key, or None where only shapes are counted."""

    def __init__(self, masks: bytes | None = None) -> None:
        super().__init__()
        self._key = masks

    def masking_weights(self, party: Party, name: str) -> AbstractContextManager[None]:
        self.series, engine = name, party.engine
        if self._key is None:
            return nullcontext()
        known: Any = engine
        masking: AbstractContextManager[None] = known.masking_weights(self._key)
        return masking


class Producer:
    """series: whose weights' masks. signer: of the dealer's key, or a fresh one. device: on which it deals."""

    def __init__(self, series: Series, signer: Signer | None = None, device: str | torch.device = "cpu") -> None:
        self.series, self.signer = series, signer or Signer.fresh()
        self._mode, self._config = Mode.parse(series.reveal), LlamaConfig.from_dict(series.config)
        self._engine = self._mode.wire(series.precision)  # its settings
        self._sizes: dict[Plan, Sizes] = {}
        keys = [fresh_key(), fresh_key()]  # of nothing: every section is of the series, or of a block
        self._dealing = self._party(lambda links: Dealer(links, keys, _Nothing(), device), device)
        self._counting = self._party(lambda links: Counting(links, _Nothing()))

    def _party(self, role: Callable[[Any], Any], device: str | torch.device = "cpu") -> Party:
        """One that has the weights' masks, or their shapes."""
        said = Announced(self._config.to_dict(), {}, series=self.series.name)
        links: Any = Absent(iter([said]))  # stands for a transport
        links.staging = Staging(device)
        runtime = role(links)
        engine = WireEngine(links, self._engine, runtime.material, runtime)
        party = Party(engine, links, 2, mode=self._mode, stocked=Known(self.series.masks))
        with torch.inference_mode():
            party.load()
        return party

    def check(self, plan: Plan) -> None:
        """Raises UsageError for a request that this model cannot run."""
        plan.check(self._config)

    def prepare(self, plan: Plan, out: Path, progress: Callable[[int], object] = lambda count: None) -> Recording:
        """A block that is to be dealt: its id and the sizes of its files are known, and nothing is written yet.

        plan: with a hidden length, so that it lasts for the longest answer. out: the new folder that it will be.
        """
        if plan not in self._sizes:
            self._sizes[plan] = sizes = Sizes()
            self._run(self._counting, plan, [], sizes)
        facts = asdict(self._engine), self._config.to_dict(), "generate", plan.facts(), 1
        manifest = make_manifest(*facts, series=self.series.name)
        return Recording(out, manifest, self._sizes[plan], progress, self.signer)

    def deal(self, plan: Plan, block: Recording) -> None:
        """Writes the block, a folder in it for each party. Raises as ``Recording``."""
        with block as recording:
            self._run(self._dealing, plan, recording.keys, recording)

    def _run(self, party: Party, plan: Plan, keys: list[bytes], material: Any) -> None:
        engine: Any = party.engine
        party.requests = 0
        with torch.inference_mode(), engine.runtime.lent(keys, material):
            party.start_request()
            for _ in generation.run(party, plan, None, party.cache()):
                pass

    def __str__(self) -> str:
        return f"series {self.series.name}, {self._config.parameters:,} parameters, {size(8 * self._config.parameters)}"
