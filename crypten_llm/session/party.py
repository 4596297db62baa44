"""One process's part in a private inference: what it holds, and how it comes to hold it.

Owns the life of a party: connect, agree on the public facts, share the owner's weights, then follow the client's
requests until it closes. Who opens what is decided here and nowhere else: the owner's process alone opens the
weights, the client's alone sees the prompt, the dealer sees shapes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import eviction
from crypten_llm import limits
from crypten_llm.errors import PartyError, UsageError, unheard
from crypten_llm.links.meter import Meter
from crypten_llm.models import checkpoint, tokenizer
from crypten_llm.models.balance import balance
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.roles import CLIENT, OWNER, role_names
from crypten_llm.session import bench, counting, generation, messages, scheduler, thin
from crypten_llm.session.admission import Admission
from crypten_llm.session.fits import Fits
from crypten_llm.session.loading import in_the_clear, loading_bar, read_weights
from crypten_llm.session.mode import Mode
from crypten_llm.session.notary import Notary
from crypten_llm.session.padded import Padded
from crypten_llm.session.plan import Plan, Turn, Turns, check_turns, parse_policy
from crypten_llm.session.prefix import Prefixes
from crypten_llm.session.prompted import Answer, Progress, Step
from crypten_llm.session.quota import Quota
from crypten_llm.session.reveal import RevealLog
from crypten_llm.session.stocked import Stocked

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.links.transport import Transport
    from crypten_llm.models.cache import KVCache
    from crypten_llm.session.bench import Shape


HEARTBEAT_SECONDS = 1.0  # between the owner's signs of life while it reads its weights


class Party:
    """A compute party: an engine, the shared model, and what has been revealed so far.

    transport is ``None`` on engine ``plain``, where one process is owner and client at once. make_policy: of a request,
    from its text; one that watches another, such as a ``Recorder``, can take its place. admission: at the owner,
    whether its model is shared. mode: what this party lets the client learn of each step, all logits by default.
    quota: at the owner, how many tokens it answers with. notary: what makes its part of receipts; by default nothing.
    sharing: ranks that are known to share this one's card, itself among them. side: its side of thin clients, where a
    helper stands for them. stocked: what was dealt before, for requests to come.
    """

    model: Llama  # once it has been loaded
    prefixes: Prefixes

    def __init__(
        self,
        engine: Engine,
        transport: Transport | None = None,
        compute_parties: int = 1,
        owner: int = OWNER,
        client: int = CLIENT,
        make_policy: Callable[[str], eviction.Policy] = parse_policy,
        make_model: Callable[..., Llama] = Llama,
        admission: Admission | None = None,
        mode: Mode | None = None,
        quota: Quota | None = None,
        notary: Notary | None = None,
        sharing: Sequence[int] = (),
        side: thin.Side | None = None,
        stocked: Stocked | None = None,
    ) -> None:
        self.engine = engine
        self.transport = transport
        self.compute_parties = compute_parties
        self.owner, self.client = (owner, client) if transport else (0, 0)
        self.rank = transport.rank if transport else 0
        # The other ranks that run this program: the compute parties, and a dealer that follows it.
        self.peers = [rank for rank in range(compute_parties + engine.dealer_follows) if rank != self.rank]
        self.reveals = self.load_reveals = RevealLog()
        self.tokens_digest: str | None = None  # of the owner's tokenizer, where its model has one
        self.requests = 0
        self._padded: dict[bool, Padded] = {}  # room for answers' caches, one after another: of a dealer's, of blocks'
        self.kept: dict[int, KVCache] = {}  # by conversation, what its next turn goes on with
        self.make_policy, self.make_model, self.admission = make_policy, make_model, admission or Admission()
        self.mode = mode or Mode()
        self.quota = quota if quota and self.is_owner else Quota()
        self.notary, self.thin = notary or Notary(), side
        self.fits = Fits(engine, self.rank, compute_parties, sharing)
        self.stocked = stocked or Stocked()
        self.outside = ""  # why answers are not to be trusted, where the model was shared all the same

    @property
    def is_client(self) -> bool:
        return self.rank == self.client

    @property
    def is_owner(self) -> bool:
        return self.rank == self.owner

    def from_client(self, message: messages.Request | None, timeout: float | None = None) -> messages.Request:
        """The client's public message, at every compute party."""
        return self._broadcast(self.client, message, messages.Request, timeout)

    def from_owner(self, message: messages.OwnerSays | None) -> messages.OwnerSays:
        """The owner's public message, at every compute party."""
        return self._broadcast(self.owner, message, messages.OwnerSays)

    def _broadcast(self, source: int, message: messages.Message | None, kind: Any, timeout: float | None = None) -> Any:
        if self.transport is None:
            return message
        return self.transport.announce(source, self.peers, message, kind, timeout)

    @property
    def numbered(self) -> int:
        """The request's number, by which its sections go: in a block that was dealt for it alone, 1."""
        return 1 if self.stocked.block else self.requests

    def start_request(self) -> None:
        """Counts from zero, and lists reveals from where the loaded model left them."""
        self.fresh_meter()
        self.requests += not self.stocked.block  # which the dealer does not follow, and does not count
        self.notary.start()
        self.reveals = self.load_reveals.copy()

    def fresh_meter(self) -> None:
        """Counts from zero again."""
        if self.transport is None:
            engine: Any = self.engine  # its own meter, as one process plays every party
            engine.meter = Meter()
        else:
            self.transport.meter = Meter()

    def expect(self, verb: str, *plans: Plan | Shape) -> None:
        """Raises UsageError when the engine was prepared for another request; nothing has happened then."""
        for plan in plans:
            self.engine.expect(verb, plan.facts(), self.requests + 1)

    def cache(self, turn: Turn | None = None) -> KVCache:
        """A new cache, or the one of the conversation that this is a ``turn`` of, which is kept.

        Raises PartyError when the turn goes on with another cache than is here.
        """
        if turn is None:
            return self.model.new_cache()
        if turn.conversation not in self.kept and len(self.kept) >= limits.CONVERSATIONS:
            raise UsageError(f"this session keeps {len(self.kept)} conversations already; end one first")
        if not turn.cached_tokens:
            self.kept[turn.conversation] = self.model.new_cache()
        cache = self.kept.get(turn.conversation)
        if cache is None or cache.length != turn.cached_tokens:
            raise PartyError(
                f"rank {self.client} (client) goes on after {turn.cached_tokens} tokens of a conversation, of which "
                f"{0 if cache is None else cache.length} are here; start all parties again"
            )
        return cache

    def padded_for(self, plan: Plan, cache: KVCache) -> Padded | None:
        """Room in which the answer's cache grows from now on, where the plan says that it is padded."""
        size = plan.room(cache.length - len(plan.public_prefix) - plan.prompt_tokens) if self.engine.pads else 0
        if not size or any(layer.window is not None for layer in cache.layers):
            return None
        which = self.stocked.block is not None
        if which not in self._padded or self._padded[which].size != size:
            self._padded[which] = Padded(self.model, size)
        self._padded[which].begin(cache, plan.pads)
        self.reveals.public(f"room for the answer's cache: {size} rows", "each of its steps is counted as of so many")
        return self._padded[which]

    def forget(self, conversation: int) -> None:
        """Drops the cache of a conversation, if there is one."""
        self.kept.pop(conversation, None)

    def load(self, folder: str | Path | None = None, progress: bool = False) -> None:
        """Shares the model. Only the owner's ``folder`` is opened; the others learn the configuration from it.

        Raises UsageError for a folder that cannot be used, and a model for which the engine would be wrong.
        Reveals: the configuration and the norms' scales, to all; of a model that is shared although the engine would be
        wrong, which of its ranges the model leaves.
        """
        self.reveals, self.kept, self._padded = RevealLog(), {}, {}
        self.quota.begin(folder or "")
        with self.engine.meter.phase("load"):
            announced, weights = self._open_model(folder, progress) if self.is_owner else (self._await(progress), {})
            config, scales = self._check_model(announced)
            self.reveals.public("architecture (config.json)", "all parties run the same program")
            self.tokens_digest, self.outside = announced.tokens, announced.outside
            if self.tokens_digest:
                self.reveals.public(
                    "digest of the tokenizer's vocabulary", "the client's ids stand for the same tokens"
                )
            self.engine.expect("model", config.to_dict(), self.requests)
            if scales:
                why = "keeps values in the secure functions' domain"
                self.reveals.public("one power of four per RMSNorm, near the size of its input", why)
            if self.outside:
                self.reveals.public("which ranges of the engine the model leaves", "--force: it is shared all the same")
            self.notary.stand_for(config, announced, self.reveals)
            masked, sharing = self.stocked.masking_weights(self, announced.series), "sharing of the weights"
            with self.engine.meter.operation(sharing, "weights"), masked, self.engine.section("weights"):
                handles = {}
                for name, shape in checkpoint.expected_shapes(config).items():
                    handles[name] = self.engine.parameter(weights.pop(name, None), shape)
                self.model = self.stocked.owning(self.make_model(self.engine, config, handles, scales))
        self.prefixes = Prefixes(
            self.engine, self.model, partial(in_the_clear, self.engine, self.model, folder) if self.is_owner else None
        )
        self.load_reveals = self.reveals

    def _check_model(self, announced: messages.Announced) -> tuple[LlamaConfig, dict[str, float]]:
        """The announced configuration, of which nothing has been made yet, and the norms' scales.

        Raises PartyError for what no model of this program is, and for one that this machine cannot hold.
        """
        with self._said_by(self.owner):
            config = LlamaConfig.from_dict(announced.config)
            if not self.is_owner:  # which has asked before it read its weights
                self.fits.model(config)
            if unknown := sorted(announced.norm_scales.keys() - checkpoint.expected_shapes(config).keys()):
                raise UsageError(f"it gives a scale for {unknown[0]}, which this model does not have")
        return config, announced.norm_scales

    @contextlib.contextmanager
    def _said_by(self, rank: int) -> Iterator[None]:
        """Around checks of what another party asks for or announces: their errors name it, this one's own pass."""
        try:
            yield
        except UsageError as error:
            if self.transport is None or rank == self.rank:
                raise
            name = f"rank {rank} ({role_names(self.compute_parties)[rank]})"
            raise PartyError(f"{name} asks for what cannot be run here: {error}") from None

    def check_plans(self, plans: Sequence[Plan], turns: Turns = (), running: Sequence[int] = ()) -> None:
        """Before anything of a request's sizes is made; running: conversations that a request goes on with now. Raises
        PartyError for what does not fit model or machine, at the client, which asks, UsageError.
        """
        with self._said_by(self.client):
            check_turns(turns, len(plans), running)
            for plan, turn in zip(plans, turns or [None] * len(plans), strict=True):
                plan.check(self.model.config, turn)
                self.engine.check_policy(parse_policy(plan.policy))
            self.fits.requests(self.model.config, plans)

    def _open_model(self, folder: str | Path | None, progress: bool) -> tuple[messages.Announced, dict]:
        """At the owner: the public announcement, which the others get, and the weights, which stay."""
        if not folder:
            raise UsageError("the owner was started without a model; give it --model")
        with unheard():
            config = LlamaConfig.from_folder(folder)
        self.fits.model(config)
        with unheard():
            tokens = tokenizer.digest(Path(folder))
            beat = self._heartbeat()
            weights = read_weights(folder, config, progress, beat, self.notary.weigher())
            if self.engine.balances:
                balance(weights, config)
        alive = partial(beat, len(weights), len(weights))
        found, outside = self.admission.decide(self.engine, Path(folder), config, weights, alive, progress)
        announced = messages.Announced(config.to_dict(), found.norm_scales, tokens, outside)
        announced = self.stocked.with_series(self, announced)
        self.from_owner(announced)
        return announced, weights

    def _heartbeat(self) -> Callable[[int, int], None]:
        """Tells the others how far it is, ``(loaded, total)``, when it is time for a sign of life."""
        told = perf_counter()

        def beat(loaded: int, total: int) -> None:
            nonlocal told
            if perf_counter() - told > HEARTBEAT_SECONDS:
                self.from_owner(messages.Loading(loaded, total))
                told = perf_counter()

        return beat

    def _await(self, progress: bool) -> messages.Announced:
        """The owner's announcement. A large checkpoint takes its time; meanwhile the owner shows that it lives."""
        with loading_bar(None, progress) as bar:
            while isinstance(message := self.from_owner(None), messages.Loading):
                bar.total = message.total
                bar.update(message.loaded - bar.n)
        return message

    def serve(self, folder: str | Path | None = None, progress: bool = False) -> None:
        """Follows the client's requests until it closes; for every compute party but the client.

        folder: where the owner finds the model; others need none.
        """
        while True:
            match self.from_client(None, timeout=math.inf):
                case messages.Close():
                    return
                case messages.Load():
                    self.load(folder, progress)
                case messages.Generate(plans, turns, is_open, block):
                    with self.stocked.supplied(self, block, plans):
                        self._answer(plans, turns, is_open)
                case messages.Forget(conversation):
                    self.forget(conversation)
                case messages.Bench(shape):
                    with self._said_by(self.client):
                        self.fits.bench(shape)
                    bench.run(self, shape)
                case messages.Offered() | messages.Stocks() as said:
                    self.stocked.hear(self, said)
                case messages.Statistics():
                    self.count(self.notary.running)
                case messages.Enter() | messages.Leave() | messages.Where() as message:
                    thin.heard(self, message)

    def _answer(self, plans: Sequence[Plan], turns: Turns, is_open: bool) -> None:
        self.start_request()
        self.check_plans(plans, turns)
        with self.quota.taken([plan.max_new_tokens for plan in plans], lambda: self.reveals.tokens):
            joining = scheduler.joining(plans, turns)
            for _ in scheduler.follow(self, joining) if is_open else self._together(plans, None, turns):
                pass

    def request_load(self, folder: str | Path | None = None, progress: bool = False) -> None:
        """At the client: has the model shared; ``folder`` is opened on engine ``plain`` alone."""
        self.from_client(messages.Load())
        self.load(folder, progress)
        self.stocked.reconcile(self)

    def request_generate(self, plan: Plan, answer: Answer) -> Generator[Progress | Step, None, None]:
        """``request_together`` of one prompt."""
        return self.request_together([plan], [answer])

    def request_together(
        self,
        plans: Sequence[Plan],
        answers: Sequence[Answer],
        turns: Turns = (),
    ) -> Generator[Progress | Step, None, None]:
        """At the client: starts one request; its ``Progress`` and ``Step`` are to be read to their end.

        turns: where a prompt goes on with a conversation, or begins one.
        """
        self.from_client(messages.Generate(tuple(plans), tuple(turns), block=self.stocked.name))
        self.start_request()
        return self._together(plans, answers, turns)

    def _together(self, plans: Sequence[Plan], answers: Sequence[Answer] | None, turns: Turns) -> Any:
        self.notary.begin(self, plans, turns[0] if len(turns) == 1 else None)
        return generation.together(self, plans, answers, turns)

    def request_open(
        self, first: Sequence[scheduler.Newcomer], door: scheduler.Door
    ) -> Generator[scheduler.Event, None, None]:
        """At the client: starts requests that others may join; their events are to be read to their end."""
        self.from_client(messages.Generate(*scheduler.said(first), is_open=True))
        self.start_request()
        return scheduler.follow(self, first, door)

    def admit(self, plans: Sequence[Plan], turns: Turns, inside: int, running: Sequence[int]) -> None:
        """Of requests that join ``inside`` others. Raises as ``check_plans``, and UsageError where they are more tokens
        than the owner answers with."""
        if not plans and not turns:
            return
        self.check_plans(plans, turns, running)
        if inside + len(plans) > limits.PROMPTS:
            raise PartyError(f"{inside + len(plans)} requests would run side by side; {limits.PROMPTS} is the most")
        self.quota.more([plan.max_new_tokens for plan in plans])

    def request_forget(self, conversation: int) -> None:
        """At the client: has all parties drop the cache of a conversation."""
        self.from_client(messages.Forget(conversation))
        self.forget(conversation)

    def request_bench(self, shape: Shape) -> dict:
        """At the client: times decode steps on random weights (see ``bench``)."""
        self.fits.bench(shape)
        self.from_client(messages.Bench(shape))
        figures = bench.run(self, shape)
        assert figures is not None, "the client sees them"
        return figures

    def collect_statistics(self) -> list[dict]:
        """At the client, after a request: every rank's counters; the dealer's last, if one takes part."""
        self.from_client(messages.Statistics())
        return self.count(self.notary.running)

    def count(self, ended: Sequence[int]) -> list[dict]:
        """The same where all parties know that it is due: ``counting.count``."""
        return counting.count(self, ended)

    def close(self) -> None:
        """Ends the others' ``serve``; at the client only."""
        if self.transport is not None:
            self.from_client(messages.Close())
