"""What a policy does with one prompt: kept and attended positions, and the attention that they recover.

INSECURE by purpose on engine ``wire``: every choice is opened; owner, client and dealer are threads of one process.
Owns the run and its figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.insecure.opened import OpenedEngine
from crypten_llm.insecure.recorder import Recorder
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.tokenizer import check_ids
from crypten_llm.roles import CLIENT
from crypten_llm.session import generation
from crypten_llm.session.party import Party
from crypten_llm.session.plan import DEFAULT_CHUNK, Plan
from crypten_llm.session.prompted import Answer, Step
from crypten_llm.session.reveal import RevealLog

if TYPE_CHECKING:
    from pathlib import Path

    from crypten_llm.links.transport import Transport
    from eviction import Policy


ENGINES = ("plain", "wire")


@dataclass(frozen=True)
class Trace:
    """layers: a ``LayerRecord`` each. token_ids: of the answer. shown: what was opened to make the trace."""

    policy: str
    engine: str
    prompt_tokens: int
    token_ids: list[int]
    layers: list
    shown: list[dict]

    def to_dict(self) -> dict:
        """The JSON object that ``trace --json`` prints. ``kept``: by layer and kv head, positions after the prompt."""
        steps = range(len(self.layers[0].attended))
        return {
            "insecure": "everything was revealed to make this trace" if self.engine == "wire" else "",
            "policy": self.policy,
            "engine": self.engine,
            "prompt_tokens": self.prompt_tokens,
            "token_ids": self.token_ids,
            "kept": [record.kept[0].tolist() for record in self.layers],
            "steps": [
                {
                    "kept": [record.kept[1 + step].tolist() for record in self.layers],
                    "attended": [record.attended[step].tolist() for record in self.layers],
                    "mass": [record.mass[step] for record in self.layers],
                }
                for step in steps
            ],
        }


def trace(
    folder: str | Path,
    policy: Policy,
    prompt_ids: list[int],
    steps: int,
    engine: str = "plain",
    chunk: int = DEFAULT_CHUNK,
) -> Trace:
    """Runs the prompt and ``steps`` decode steps with ``policy`` on the model in ``folder``; decoding is greedy.

    Reveals: on engine ``wire`` the queries, keys and choices, to this process.
    Raises UsageError for a model, prompt or policy that cannot be run.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine is {engine!r}; trace runs on {' or '.join(ENGINES)}")
    if not policy.acts:
        raise UsageError(f"policy '{policy}' keeps and attends to everything; trace another (--policy)")
    config = LlamaConfig.from_folder(folder)
    plan = Plan(len(prompt_ids), steps + 1, chunk, policy=str(policy)).check(config)
    answer = Answer(check_ids(prompt_ids, config.vocab_size), lambda logits: int(logits.argmax()))
    if engine == "plain":
        recorder = Recorder(policy, lambda handle: handle)
        party = Party(PlainEngine(), make_policy=lambda text: cast("Policy", recorder))
        party.load(folder)
        tokens, shown = _token_ids(generation.run(party, plan, answer)), RevealLog()
    else:
        recorder, tokens, shown = run_roles(lambda transport: _play(transport, folder, policy, plan, answer))[CLIENT]
    return Trace(str(policy), engine, len(prompt_ids), tokens, recorder.in_order, shown.as_list())


def _token_ids(events: Any) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Step)]


def _play(transport: Transport, folder: str | Path, policy: Policy, plan: Plan, answer: Answer) -> Any:
    """At each role; the client returns its recorder, the answer and what was shown."""
    engine = OpenedEngine(transport)
    recorder = Recorder(policy, engine.see)
    party = Party(engine, transport, compute_parties=2, make_policy=lambda text: cast("Policy", recorder))
    if not party.is_client:
        return party.serve(folder)
    party.request_load()
    tokens = _token_ids(party.request_generate(plan, answer))
    party.close()
    return recorder, tokens, engine.shown
