"""A public prefix on secret shares: no round, no dealer, one message of noise, and the answers of the same prompt."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
from hf_models import EVERY_CASE, tiny, with_template
from test_cost import by_kind, dealer_by_phase, generate
from test_wire_security import EXTREMES, assert_uniform
from wire_parties import CLIENT, DEALER, OWNER, joined, run

from crypten_llm import PrivateLlama
from crypten_llm.commands import cost
from crypten_llm.commands.cli import main
from crypten_llm.commands.deal import deal
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.kernels.ring import packed_size
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.session.generation import run as generation_run
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer
from crypten_llm.session.request import Request

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 97, (40,), generator=GENERATOR).tolist()
NEW = [5, 6, 7, 8, 9, 10]  # what the model is told that it has drawn
KEYS, VALUES = WireConfig().key_width, WireConfig().mixed_width  # bits of the rows' rings

# The rows.


def contents(engine, value, values):
    rows = engine.known_rows(value if engine.rank == OWNER else None, value.shape, values)
    assert rows.shape == value.shape
    return engine.contents(rows)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_rows_are_the_owner_s_numbers(seed, values):
    """Up to the ring's largest, of any shape; what shares stand for is the nearest multiple of a unit."""
    generator = torch.Generator().manual_seed(seed)
    shape = [int(torch.randint(1, 9, (), generator=generator)) for _ in range(3)]
    value = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (seed - 1)
    value.view(-1)[0] = (-1) ** seed * 2.0**18
    outcome = run(contents, value, values, engine=True)
    mine, theirs = outcome.results[OWNER], outcome.results[CLIENT]
    assert not theirs.share.any(), "the client's share is zero"
    assert torch.equal(joined(mine, theirs), (value * 2**mine.scale).round().long())
    sent = packed_size(value.numel(), mine.width)
    assert outcome.cost() == (1, sent, 0, 0, 0)  # alone it is a message of its own
    outcome.check_meter()


@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("values", [False, True])
def test_the_message_is_uniform(integers, values):
    """Keys and values of zeros, of the largest numbers, of ramps: what the client is sent is noise of the ring."""
    value = integers.double().view(2, 32, 64) / 2**13
    outcomes = [run(contents, value, values, engine=True, seed=seed) for seed in range(3)]
    assert all(outcome.frames[CLIENT] == outcome.frames[DEALER] == [] for outcome in outcomes)
    payloads = [frame.payload for outcome in outcomes for frame in outcome.frames[OWNER]]
    assert len(set(payloads)) == len(payloads) == 3
    assert_uniform(b"".join(payloads), outcomes[0].results[OWNER].width, "known rows")


def twice(engine, value):
    for _ in range(2):
        engine.contents(engine.known_rows(value if engine.rank == OWNER else None, value.shape))


def test_the_same_rows_are_hidden_anew():
    first, second = run(twice, torch.ones(2, 30, 8), engine=True).frames[OWNER]
    assert first.payload != second.payload and len(first.payload) == len(second.payload)


def attend(engine, keys, values, query, made):
    """Attention of one query over known rows, and over known rows with one that was opened behind them."""
    at_owner, at_client = engine.rank == OWNER, engine.rank == CLIENT
    known = [engine.known_rows(x if at_owner else None, x.shape, v) for x, v in ((keys, False), (values, True))]
    joining = engine.secret(made if at_client else None, made.shape, CLIENT)
    query = engine.secret(query if at_client else None, query.shape, CLIENT)
    for count in range(2):
        scores = engine.scores(query, known[0])
        mixed = engine.mix(engine.softmax(scores), known[1])
        yield engine.open_to(scores, CLIENT), engine.open_to(mixed, CLIENT)
        if not count:
            known = [
                engine.cat([known[0], engine.rows(joining)], 1),
                engine.cat([known[1], engine.rows(joining, True)], 1),
            ]


@pytest.mark.parametrize("seed", range(4))
def test_attention_over_known_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    heads, group, rows, dim = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(4))
    keys, values = (torch.randn(heads, rows, dim, generator=generator) for _ in range(2))
    made, query = (torch.randn(heads, count, dim, generator=generator) for count in (1, group))
    found = run(lambda engine: list(attend(engine, keys, values, query, made)), engine=True).results[CLIENT]
    plain = PlainEngine(softmax_base=2.0)
    for (scores, mixed), (k, v) in zip(
        found, ((keys, values), (torch.cat([keys, made], 1), torch.cat([values, made], 1))), strict=True
    ):
        expected = query @ k.mT
        assert (scores - expected).abs().max() < 1e-3 * dim
        assert (mixed - plain.softmax(expected) @ v).abs().max() < 3e-3


# Whole models on engine ``wire``.


def watched(ids):
    """Logits that will have been seen, and an answer of ``NEW`` to a prompt, which notes them."""
    seen, drawn = [], iter(NEW)
    return seen, Answer(ids, lambda row: seen.append(row) or next(drawn))


def session(engine, folder, plans):
    """At the client, for each plan, logits [steps, V] and both parties' tables; prompts are the ends of ``IDS``."""
    party = Party(engine, engine.transport, 2)
    if engine.rank != CLIENT:
        return party.serve(folder if engine.rank == OWNER else None)
    party.request_load()
    found = []
    for plan in plans:
        seen, answer = watched(IDS[len(plan.public_prefix) :][: plan.prompt_tokens])
        for _ in party.request_generate(plan, answer):
            pass
        found.append((torch.stack(seen), [entry["table"] for entry in party.collect_statistics()][:2]))
    party.close()
    return found


def in_the_clear(folder, plan):
    party = Party(PlainEngine())
    party.load(folder)
    seen, answer = watched(IDS[: len(plan.public_prefix) + plan.prompt_tokens])
    whole = replace(plan, prompt_tokens=len(answer.prompt_ids), public_prefix=())
    for _ in generation_run(party, whole, answer):
        pass
    return torch.stack(seen)


def counted(tables, kind, *names):
    return [[row[name] for name in names] for table in tables for row in table if row["kind"] == kind]


@pytest.mark.parametrize(
    "case", ["gqa", "mistral_window", "qwen2_window", "qwen3_rope", "qwen3_window_by_type", "attention_bias"]
)
def test_logits_and_what_they_cost(tmp_path, case):
    """As in the clear without a prefix; rounds and the dealer's bytes of its own are none, and it is sent once."""
    folder, _ = tiny(tmp_path, **EVERY_CASE[case])
    public = IDS[:11]
    plan = Plan(7, 3, chunk=4, public_prefix=public)
    other, bare = replace(plan, public_prefix=IDS[:5]), replace(plan, public_prefix=())
    plans = [bare, plan, plan, other, bare]  # the weights of head norms are sent with the first request
    _, first, again, short, last = run(session, str(folder), plans, engine=True).results[CLIENT]
    expected = in_the_clear(folder, plan)
    for logits, _ in (first, again):
        assert (logits - expected).abs().max() < 0.03
    assert (short[0] - in_the_clear(folder, other)).abs().max() < 0.03
    config = LlamaConfig.from_folder(folder)
    sent = 0
    for window in config.windows or (None,) * config.num_hidden_layers:
        numbers = config.num_key_value_heads * min(11, (window or 99) - 1) * config.head_dim
        sent += packed_size(numbers, KEYS) + packed_size(numbers, VALUES)
    rest = "dealer_bytes_received", "dealer_rounds", "rounds"
    assert counted(first[1], "prefix", "bytes_sent", "bytes_received", *rest) == [
        [sent, 0, 0, 0, 0],
        [0, sent, 0, 0, 0],
    ]
    assert counted(again[1], "prefix", "bytes_sent", "bytes_received", *rest) == [[0] * 5] * 2
    for _, tables in (first, again, short):
        for mine, theirs in zip(tables, last[1], strict=True):
            assert sum(row["rounds"] for row in mine) == sum(row["rounds"] for row in theirs)


def owner_is_asked(transport, folder, plan):
    party = Party(WireEngine(transport), transport, compute_parties=2)
    if not party.is_client:
        return party.serve(folder)
    party.request_load()
    party.transport.announce(CLIENT, party.peers, {"verb": "generate", "plans": [plan]})
    party.transport.recv_json(OWNER)


@pytest.mark.parametrize("ids", [[97], [5, -1], [5, True], [5, "a"]])
def test_the_others_refuse_an_id_that_there_is_not(tmp_path, ids):
    """Whatever the client let through: the owner and the dealer look themselves."""
    folder, _ = tiny(tmp_path, num_hidden_layers=1)
    plan = {**asdict(Plan(3, 2)), "public_prefix": ids}
    words = "token id 97 is not in the vocabulary; ids go from 0 to 96|Expected `int`.* at `.*public_prefix"
    with pytest.raises((UsageError, PartyError), match=words):
        run_roles(lambda links: owner_is_asked(links, str(folder), plan), timeout=30)


# What a command counts, and tapes.


@pytest.mark.parametrize("case", ["gqa", "qwen2_window"])
def test_counted_costs_are_those_of_a_run(tmp_path, case):
    folder, _ = tiny(tmp_path, **EVERY_CASE[case] | {"num_hidden_layers": 3})
    for plan in (Plan(5, 3, chunk=3, public_prefix=IDS[:9]), Plan(1, 2, public_prefix=IDS[:4])):
        _, (_, measured, _), _ = run_roles(lambda links, plan=plan: generate(links, folder, plan))
        placeholders = replace(plan, public_prefix=(0,) * len(plan.public_prefix))
        prediction = cost.predict(LlamaConfig.from_folder(folder), placeholders)
        for rank, table in enumerate(measured):
            assert by_kind(prediction.cost.ranks[rank]["table"]) == by_kind(table)
            assert dealer_by_phase(prediction.cost.ranks[rank]["table"]) == dealer_by_phase(table)
        assert ("prefill", "prefix") in by_kind(prediction.cost.ranks[CLIENT]["table"])


def test_layers_counted_once_are_all_counted(monkeypatch):
    config = LlamaConfig.from_sizes(hidden=64, heads=4, kv_heads=2, ffn=160, layers=5, vocab=97, context=64)
    plan = Plan(20, max_new_tokens=2, chunk=16, public_prefix=(0,) * 20)
    quick = cost.predict(config, plan)
    monkeypatch.setattr(cost._AlikeLayers, "through", Llama.through)
    slow = cost.predict(config, plan)
    assert quick.cost.ranks == slow.cost.ranks
    assert quick.memory == slow.memory == cost.predict(config, Plan(40, max_new_tokens=2, chunk=16)).memory


def test_cost_counts_a_prefix(capsys):
    sizes = ["--hidden", "64", "--heads", "4", "--ffn", "96", "--layers", "2", "--vocab", "97", "--prompt-tokens", "8"]
    assert main(["cost", *sizes, "--public-prefix", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["public_prefix"] == 30
    (row,) = (row for row in found["table"] if row["kind"] == "prefix")
    assert (row["rounds"], row["dealer_bytes"]) == (0, 0)
    assert row["bytes_sent"] == 2 * (packed_size(30 * 64, KEYS) + packed_size(30 * 64, VALUES))
    assert main(["cost", *sizes, "--public-prefix", "-1"]) == 2
    assert "--public-prefix is -1; it must be a number of tokens" in capsys.readouterr().err


def test_a_tape_for_prefixes_of_a_length(tmp_path):
    """Which tokens they are is not known when it is dealt: each of its requests may begin with others."""
    folder, _ = tiny(tmp_path, num_hidden_layers=2)
    plan = Plan(4, 3, public_prefix=(0,) * 6)
    deal(plan, tmp_path / "tape", LlamaConfig.from_folder(folder), requests=3, say=lambda line: None)
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        expected = [llama.generate(input_ids=IDS[a : a + 10], max_new_tokens=3).token_ids for a in (0, 20, 0)]
    settings = {"engine": "wire", "tape": str(tmp_path / "tape"), "timeout": 60, "threads": 1}
    request = {"input_ids": IDS[6:10], "max_new_tokens": 3}
    command = "deal --model MODEL --prompt-tokens 4 --max-new-tokens 3 --chunk 128 --policy full --out DIR"
    with pytest.raises(UsageError, match=f"public_prefix is 0, but the tape is .*public_prefix 6, .*; .* {command}"):
        PrivateLlama.from_pretrained(str(folder), first=Request(**request), **settings)
    with PrivateLlama.from_pretrained(str(folder), **settings) as llama:
        with pytest.raises(UsageError, match="public_prefix is 5, but .* --public-prefix 5 --out DIR"):
            llama.generate(**request, public_prefix=IDS[1:6])
        for start, tokens in zip((0, 20, 0), expected, strict=True):
            ids = IDS[start : start + 10]
            found = llama.generate(input_ids=ids[6:], public_prefix=ids[:6], max_new_tokens=3)
            assert found.token_ids == tokens
            (row,) = (row for row in found.cost.table() if row["kind"] == "prefix")
            assert row["bytes_sent"] and not row["rounds"]


# Sessions of both private engines.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("prefix"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture(scope="module", params=["wire", pytest.param("crypten", marks=pytest.mark.slow)])
def private(model, request):
    with PrivateLlama.from_pretrained(str(model), engine=request.param, timeout=60, threads=1) as llama:
        yield llama


def clear_prompts(plain, public, count):
    """Ids after ``public`` whose greedy answers of three tokens have no close call, and the answers."""
    found = []
    for seed in itertools.count():
        ids = torch.randint(3, 2048, (4 + seed % 3,), generator=torch.Generator().manual_seed(seed)).tolist()
        answer = plain.generate(input_ids=[*public, *ids], max_new_tokens=3, logprobs=2)
        if min(step.top[0][1] - step.top[1][1] for step in answer.logprobs) > 0.1:
            found.append((ids, answer.token_ids))
        if len(found) == count:
            return found


def test_prompts_that_share_a_prefix(private, plain):
    """Side by side and one after the other: the rounds of a batch without one, and on ``wire`` it is sent once."""
    public = IDS[:13]
    prompts = clear_prompts(plain, public, 3)
    asked = [Request(input_ids=ids, public_prefix=public, max_new_tokens=3) for ids, _ in prompts]
    together = private.generate(asked)
    assert [found.token_ids for found in together] == [tokens for _, tokens in prompts]
    again = private.generate(asked[:2])
    alone = private.generate(asked[2:])
    assert [found.token_ids for found in again + alone] == [tokens for _, tokens in prompts]
    bare = private.generate([Request(input_ids=each.input_ids, max_new_tokens=3) for each in asked])
    if private.protocol.engine == "wire":
        assert together[0].cost.rounds() == bare[0].cost.rounds()
        sent = [next(r["bytes_sent"] for r in f[0].cost.table() if r["kind"] == "prefix") for f in (together, again)]
        assert sent == [packed_size(13 * 16, KEYS) + packed_size(13 * 16, VALUES), 0]
    told = [entry for entry in together[0].revealed if entry["what"] == "public prefix: 13 tokens, known to all"]
    assert [entry["times"] for entry in told] == [3]
