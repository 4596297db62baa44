"""The dealer alone: what it would send the parties of a request, written to a tape before there is any request.

Owns no protocol. The dealer runs the program that it runs beside the parties (``Party.serve``); what it would hear
from them are public facts, which are read out here. It needs a model's config.json and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import UsageError
from crypten_llm.links.signatures import Signer, fingerprint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.manifest import Manifest, make_manifest
from crypten_llm.protocols.dealer.recording import Recording, Sizes
from crypten_llm.records import Record
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session.api import check_policy
from crypten_llm.session.bench import Shape
from crypten_llm.session.messages import Announced, Bench, Close, Generate, Load
from crypten_llm.session.mode import Mode
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.producing import Absent
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.protocols.dealer.runtime import Runtime


def _generation(config: LlamaConfig, plan: Plan, requests: int) -> Iterator[Record]:
    """What the client and the owner say in a session of equal requests."""
    yield Load()
    yield Announced(config.to_dict(), {})
    for _ in range(requests):
        # With hidden length nobody stops early: the tape lasts for the longest answer.
        yield Generate((replace(plan, hide_length=True),))
    yield Close()


def _bench(shape: Shape, requests: int) -> Iterator[Record]:
    for _ in range(requests):
        yield Bench(shape)
    yield Close()


def deal(
    work: Plan | Shape,
    out: str | Path,
    config: LlamaConfig | None = None,
    requests: int = 1,
    say: Callable[[str], object] = print,
    progress: bool = False,
    tls: str = "",
    device: str | torch.device = "cpu",
    precision: str = "default",
) -> Manifest:
    """Writes the tape for ``requests`` times ``work`` to the new folder ``out``, a folder in it for each party; returns
    its manifest.

    config: of the model, for a ``Plan``. say: called with each line about the run. tls: the dealer's folder of keys,
    with whose own it signs; else a key for this tape alone does. device: on which it is dealt. precision:
    the preset that both parties will run.

    Raises UsageError for a request that no model can run, a key that cannot be read, and when ``out`` cannot be
    written.
    """
    check_policy(work.policy)
    verb = "generate" if isinstance(work, Plan) else "bench"
    model = config if isinstance(work, Plan) else work.config()
    if model is None:
        raise UsageError("a plan comes with its model's configuration; give config=LlamaConfig.from_folder(...)")
    counts = {"requests": requests} | {name: getattr(work, name, 1) for name in ("max_new_tokens", "chunk")}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; it must be 1 or more")
    if isinstance(work, Plan):
        work.check(model)
    signer = Signer.of_role(tls, "dealer") if tls else Signer.fresh()

    def run(material: Any, role: Callable[[Any, Any], Runtime]) -> None:
        script = _generation(model, work, requests) if isinstance(work, Plan) else _bench(work, requests)
        links: Any = Absent(script)  # stands for a transport
        with torch.inference_mode():
            Party(WireEngine(links, engine, material, role(links, material)), links, 2, mode=mode).serve()

    mode = Mode.parse(work.reveal) if isinstance(work, Plan) else Mode()
    engine, sizes = mode.wire(precision), Sizes()
    run(sizes, Counting)
    total = [sizes.total(party) for party in (OWNER, CLIENT)]
    say(f"tape for {requests} x {verb}: {size(total[OWNER])} for the owner, {size(total[CLIENT])} for the client")
    started = perf_counter()
    manifest = make_manifest(asdict(engine), model.to_dict(), verb, work.facts(), requests)
    bar = tqdm(desc="dealing", total=sum(total), unit="B", unit_scale=True, disable=not progress, leave=False)
    with bar, Recording(Path(out), manifest, sizes, bar.update, signer) as recording:
        run(recording, partial(roles.make, device=device))
    seconds = perf_counter() - started
    say(f"{out}: tape {manifest.id} in {seconds:.1f} s ({size(sum(total) / seconds)}/s)")
    whose = "the dealer's key" if tls else "a key of this tape alone"
    say(f"signed by {whose}, {fingerprint(signer.public)}")
    say(f"carry {out}/owner to the owner alone, {out}/client to the client alone")
    return recording.manifest
