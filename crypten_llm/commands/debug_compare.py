"""Where does engine ``wire`` part from ``plain``, and does it use every mask once? Debugging on one input.

INSECURE by purpose: everything is opened. Owner, client and dealer are threads of this process, so nothing here can
be asked of parties on other machines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.insecure import audit as wire_audit
from crypten_llm.insecure.compare import CompareEngine
from crypten_llm.insecure.finding import Finding
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.tokenizer import check_ids
from crypten_llm.roles import CLIENT, role_names
from crypten_llm.session import generation
from crypten_llm.session.party import Party
from crypten_llm.session.plan import DEFAULT_CHUNK, Plan
from crypten_llm.session.prompted import Answer

if TYPE_CHECKING:
    from pathlib import Path

    from crypten_llm.engines.base import Engine
    from crypten_llm.links.transport import Transport


@dataclass(frozen=True)
class Comparison:
    """findings: every operation in order. logit_errors: by token, the largest difference of the final logits, errors of
    all operations together. equal_tokens: whether both engines' best tokens agree, by token. shown: what was revealed.
    """

    findings: list[Finding]
    logit_errors: list[float]
    equal_tokens: list[bool]
    shown: list[dict]

    @property
    def first_beyond(self) -> Finding | None:
        """The first operation whose error left its bound."""
        return next((finding for finding in self.findings if not finding.holds), None)

    def describe_first(self) -> str:
        """In words, the operation that ``first_beyond`` found."""
        found = self.first_beyond
        if found is None:
            return "every operation stayed within its declared bound"
        reason = found.outside or f"its error {found.error:.2g} is beyond the declared {found.bound:.2g}"
        return f"{found.operation} is the first operation to leave its bound, in {found.where}: {reason}"

    def worst(self) -> list[Finding]:
        """By place and operation, the finding that used most of its bound, or the first that left it."""
        found: dict[tuple, Finding] = {}
        for finding in self.findings:
            key = finding.where, finding.operation
            before = found.setdefault(key, finding)
            if before.holds and (not finding.holds or finding.used > before.used):
                found[key] = finding
        return list(found.values())

    def to_dict(self) -> dict:
        first = self.first_beyond
        return {
            "insecure": "everything was revealed",
            "first_beyond_bound": first and first.to_dict(),
            "operations": len(self.findings),
            "logit_errors": self.logit_errors,
            "equal_tokens": self.equal_tokens,
            "worst": [finding.to_dict() for finding in self.worst()],
            "revealed": self.shown,
        }


def compare(
    folder: str | Path,
    prompt_ids: list[int],
    steps: int = 2,
    chunk: int = DEFAULT_CHUNK,
    policy: str = "full",
) -> Comparison:
    """Runs ``steps`` tokens of both engines on the model in ``folder``; both go on with the best token of ``plain``.

    policy: an eviction policy, whose operations are held as well.

    Reveals: everything, to this process.
    Raises UsageError for a model or a prompt that cannot be run.
    """
    plan = _check(folder, prompt_ids, steps, chunk, policy)
    expected = _plain_logits(folder, prompt_ids, plan)
    weights: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []

    def follow(found: torch.Tensor) -> int:
        logits.append(found)
        return int(expected[len(logits) - 1].argmax())

    engines = _run(lambda transport: CompareEngine(transport, weights), folder, plan, Answer(prompt_ids, follow))
    engine = engines[CLIENT]
    pairs = list(zip(logits, expected, strict=True))
    errors = [(found - wanted).abs().max().item() for found, wanted in pairs]
    equal = [bool(found.argmax() == wanted.argmax()) for found, wanted in pairs]
    return Comparison(engine.findings, errors, equal, engine.shown.as_list())


def audit(folder: str | Path, prompt_ids: list[int], steps: int = 2, chunk: int = DEFAULT_CHUNK) -> dict[str, dict]:
    """Runs ``steps`` tokens of engine ``wire`` as it is, with masks that may never hide two things (``wire.audit``).

    Returns by role what was drawn and checked: streams, stream_bytes, masks, words, unused, messages.
    Reveals: the logits, to the client's role. Raises MaskReused, with the step's name; UsageError as ``compare``.
    """
    plan = _check(folder, prompt_ids, steps, chunk)

    def audited(transport: Transport) -> WireEngine:
        return WireEngine(transport, runtime=wire_audit.audit(transport))

    answer = Answer(prompt_ids, lambda logits: int(logits.argmax()))
    engines = _run(audited, folder, plan, answer)
    return {name: engine.runtime.audit.to_dict() for name, engine in zip(role_names(2), engines, strict=True)}


def _check(folder: str | Path, prompt_ids: list[int], steps: int, chunk: int, policy: str = "full") -> Plan:
    config = LlamaConfig.from_folder(folder)
    plan = Plan(len(prompt_ids), steps, chunk, policy=policy).check(config)
    check_ids(prompt_ids, config.vocab_size)
    return plan


def _run(make_engine: Callable[[Transport], Engine], folder: str | Path, plan: Plan, answer: Answer) -> list:
    """The engines of all three roles after one request, which follows ``plan`` to its end."""

    def play(transport: Transport) -> Engine:
        party = Party(make_engine(transport), transport, compute_parties=2)
        if not party.is_client:
            party.serve(folder)
            return party.engine
        party.request_load()
        for _ in party.request_generate(plan, answer):
            pass
        party.close()
        return party.engine

    return run_roles(play)


@torch.inference_mode()
def _plain_logits(folder: str | Path, prompt_ids: list[int], plan: Plan) -> list[torch.Tensor]:
    """The logits of each token of the greedy answer."""
    logits: list[torch.Tensor] = []
    party = Party(PlainEngine())
    party.load(folder)

    def best(found: torch.Tensor) -> int:
        logits.append(found)
        return int(found.argmax())

    for _ in generation.run(party, plan, Answer(prompt_ids, best)):
        pass
    return logits
