"""What tests have real parties do (see ``parties``). Each function runs in every compute party's process."""

from dataclasses import replace

import torch

from crypten_llm.engines.crypten import engine as crypten_engine  # noqa: F401  (imported once in the server)
from crypten_llm.engines.crypten.domain import norm_scales
from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama, prepare
from crypten_llm.protocols.dealer.randomness import Stream
from crypten_llm.session.bench import run as bench_run
from crypten_llm.session.calibration import measure
from crypten_llm.session.generation import run as generation_run
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, parse_policy
from crypten_llm.session.prompted import Answer, Step
from crypten_llm.session.reveal import RevealLog
from crypten_llm.session.sampling import Sampler, SamplingConfig


@torch.inference_mode()
def operation(engine, method, secrets, public):
    """One operation on shared inputs: its value at the client, and the online rounds and bytes it took there."""
    handles = [None if x is None else engine.parameter(x if engine.rank == 0 else None, x.shape) for x in secrets]
    before = engine.meter.snapshot()
    out = getattr(engine, method)(*handles, *public)
    online = (engine.meter.snapshot() - before).online
    return RevealLog().open_to_client(engine, out, 1, "a test's result", "to compare"), online.rounds, online.bytes_sent


def operations(engine, cases):
    """``operation`` for each (method, secrets, public)."""
    return [operation(engine, *case) for case in cases]


@torch.inference_mode()
def tokens(engine, ids, vocab_size):
    """The client's one-hot rows, shared and opened again."""
    shared = engine.tokens(ids if engine.rank == 1 else None, len(ids), vocab_size)
    return RevealLog().open_to_client(engine, shared, 1, "a test's tokens", "to compare")


def generate(engine, parties, folder, requests):
    """A session: the model is shared once, then each request (plan, prompt ids, sampling, stop ids) is run.

    Each party returns, per request, what it knows afterwards; the tokens are the client's alone.
    """
    party = Party(engine, engine.transport, parties)
    party.load(folder if engine.rank == 0 else None)
    outcomes = []
    for plan, ids, sampling, stop_ids in requests:
        party.start_request()
        answer = Answer(ids, Sampler(SamplingConfig(**sampling)), stop_ids) if engine.rank == 1 else None
        steps = [event for event in generation_run(party, Plan(**plan), answer) if isinstance(event, Step)]
        totals = engine.meter.snapshot()
        outcomes.append(
            {
                "tokens": [step.token_id for step in steps],
                "finish_reason": steps[-1].finish_reason if steps else None,
                "table": engine.meter.table(),
                "online": totals.online,
                "dealer": totals.dealer,
                "last_step": steps[-1] if steps else None,
                "revealed": party.reveals.as_list(),
            }
        )
    return outcomes


@torch.inference_mode()
def logits(engine, folder, ids, pieces):
    """Logits [T, V] at the client of the owner's model for the client's ``ids``, passed in chunks of these sizes."""
    config = LlamaConfig.from_folder(folder)
    weights, scales = {}, None
    if engine.rank == 0:
        weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
        scales = norm_scales(measure(config, weights))
        engine.transport.send_json(1, scales)
    else:
        scales = engine.transport.recv_json(0)
    shapes = checkpoint.expected_shapes(config)
    model = Llama(engine, config, {name: engine.parameter(weights.get(name), shapes[name]) for name in shapes}, scales)
    cache, start, rows, log = model.new_cache(), 0, [], RevealLog()
    for size in pieces:
        piece = ids[start : start + size] if engine.rank == 1 else None
        one_hot = engine.tokens(piece, size, config.vocab_size)
        out = model(one_hot, cache, last_only=False, seq_len=len(ids))
        rows.append(log.open_to_client(engine, out, 1, "logits of a test", "to compare"))
        start += size
    return torch.cat(rows) if engine.rank == 1 else None


def forbid_torch_randomness():
    """Makes every function of torch that draws from a ``torch.Generator`` raise, in this process."""

    def forbidden(name):
        def refuse(*_, **__):
            raise AssertionError(f"torch.{name} was used")

        return refuse

    for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "rand_like", "randint_like"):
        setattr(torch, name, forbidden(name))
    for name in ("random_", "uniform_", "normal_", "bernoulli_"):
        setattr(torch.Tensor, name, forbidden(name))


def use_forbidden_randomness(engine):
    forbid_torch_randomness()
    torch.randint(3, (2,))


def generate_without_torch_randomness(engine, folder, request):
    party = Party(engine, engine.transport, 2)
    party.load(folder if engine.rank == 0 else None)
    party.start_request()
    forbid_torch_randomness()
    plan, ids, sampling, stop_ids = request
    answer = Answer(ids, lambda logits: int(logits.argmax()), stop_ids) if engine.rank == 1 else None
    return [event.token_id for event in generation_run(party, Plan(**plan), answer) if isinstance(event, Step)]


def shares_of_zero(engine, times):
    zero = torch.zeros(10_000)
    return [engine.parameter(zero if engine.rank == 0 else None, zero.shape).share for _ in range(times)]


@torch.inference_mode()
def stream_draws(engine):
    """(stream, position, count) of every read of a key stream during a softmax."""
    draws, words = [], Stream.words

    def watched(stream, count):
        draws.append((id(stream), stream.position - start.setdefault(id(stream), stream.position), 8 * count))
        return words(stream, count)

    start = {}
    Stream.words = watched
    scores = engine.parameter(torch.zeros(2, 8) if engine.rank == 0 else None, (2, 8))
    engine.softmax(scores)
    return draws


@torch.inference_mode()
def sent_in_two_products(engine):
    sent, exchange = [], engine.transport.all_exchange_many

    def watched(peers, tensors, *rest):
        sent.append(torch.cat([tensor.flatten().clone() for tensor in tensors]))
        return exchange(peers, tensors, *rest)

    engine.transport.all_exchange_many = watched
    x = engine.parameter(torch.ones(3, 4) if engine.rank == 0 else None, (3, 4))
    y = engine.parameter(torch.ones(4, 2) if engine.rank == 0 else None, (4, 2))
    engine.matmul(x, y)
    engine.matmul(x, y)
    return sent


def watch_dealer(transport):
    """At the dealer: records every message and counts the tensors that come in, keys not among them."""
    messages, tensors = [], []
    recv, recv_json = transport.recv, transport.recv_json

    def watched_json(*arguments, **options):
        message = recv_json(*arguments, **options)
        messages.append(message)
        return message

    def watched(*arguments, **options):
        tensors.append(arguments)
        return recv(*arguments, **options)

    transport.recv, transport.recv_json = watched, watched_json
    return lambda: (messages, len(tensors))


def bench(engine, shape):
    """Figures and counters of a bench, and the rounds of one more step alone."""
    party = Party(engine, engine.transport, 2)
    party.start_request()
    figures = bench_run(party, shape)
    table = engine.meter.table()
    bench_run(party, replace(shape, steps=1))
    one_step = sum(row["rounds"] for row in engine.meter.table() if row["phase"] == "decode")
    return {"figures": figures, "table": table, "one_step": one_step}


def refused_policies(engine, policies):
    """What the engine says to each of them on a device that is no processor."""
    engine.device, said = torch.device("meta"), []
    for policy in policies:
        try:
            engine.check_policy(parse_policy(policy))
        except UsageError as error:
            said.append(str(error))
    return said


def held(engine):
    """What each of three ranks keeps of a weight and of a cached number."""
    return [tuple(engine.holds(rank)) for rank in range(3)]
