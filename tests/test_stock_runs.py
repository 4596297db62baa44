"""Requests from stock: of a session at once, of an endpoint, after a restart; without a block the dealer follows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from endpoints import client, opened, service
from hf_models import tiny, with_tokenizer
from msgspec import structs
from stocks import put_all

from crypten_llm.commands.cost import predict, predict_open
from crypten_llm.errors import UsageError
from crypten_llm.serving.fair_queue import ROOM
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.stocking import Stocking
from crypten_llm.session import series
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.delivery import Level
from crypten_llm.session.producing import Producer

IDS = [5, 6, 7, 8, 9]
TEXT = "/v1/completions"
BODY = {"prompt": IDS, "max_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("stocked"))


@pytest.fixture(scope="module")
def expected(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        return llama.generate(input_ids=IDS, max_new_tokens=3, eos_token_id=[], logprobs=0)


def from_stock(folder, model, **settings):
    """Opens sessions; the last of them, and whoever deals for it."""
    made = SimpleNamespace(llama=None, producer=None)

    def open_session():
        made.llama = opened(model, engine="wire", stock=str(folder), timeout=60, **settings)()
        made.producer = Producer(series.read(folder / "owner"))
        return made.llama

    return made, open_session


def value(made, name, **labels):
    return made.metrics.registry.get_sample_value(f"crypten_llm_stock_{name}", labels)


def test_an_endpoint_takes_from_stock_what_is_there(model, expected, tmp_path, monkeypatch):
    folder, level = tmp_path / "stock", Level(8, 4, 2)
    session, open_session = from_stock(folder, model)

    def stocking(dealt, metrics, *options):
        priced = Pricer(lambda config, courses: predict(config, courses[0].plan, from_stock=True), "wire")
        return Stocking(priced, dealt, metrics, *options)

    monkeypatch.setattr("crypten_llm.serving.service.Stocking", lambda pricer, dealt, metrics: stocking(dealt, metrics))

    def predicted(config, courses):
        return predict_open(config, courses, ROOM)

    with service(open_session, predict=predicted, engine="wire") as made:
        http = client(made)
        missed = http.post(TEXT, json=BODY).json()
        assert not missed["crypten_llm"]["from_stock"] and value(made, "misses_total", why="no block") == 1
        names = [put_all(session.producer, folder, level.plan(), tmp_path / f"block{number}") for number in range(2)]
        price = http.post("/v1/price", json=BODY).json()
        assert price["from_stock"] and price["seconds_with_dealer"] > 0 and value(made, "blocks", shape="8+4") == 2
        answer = http.post(TEXT, json=BODY).json()
        facts = answer["crypten_llm"]
        assert facts["from_stock"] and answer["choices"][0]["text"] == missed["choices"][0]["text"]
        assert [facts[name] for name in ("rounds", "bytes_sent", "dealer_bytes")] == [
            price[name] for name in ("rounds", "bytes_sent", "dealer_bytes")
        ], "exact with pads and without a dealer"
        assert value(made, "hits_total") == 1 and value(made, "wait_seconds_total") == 0
        several = http.post(TEXT, json={**BODY, "n": 2}).json()
        assert not several["crypten_llm"]["from_stock"] and value(made, "misses_total", why="several answers") == 1
        (receipt,) = http.get(facts["receipt"]).json()["receipts"]
        assert [part["part"]["role"] for part in receipt["parts"]] == ["owner", "client"]
        assert {part["part"]["tape"] for part in receipt["parts"]} == {names[0]}
        with http.stream("POST", TEXT, json={**BODY, "stream": True}) as response:
            assert '"from_stock":true' in response.read().decode()
        assert value(made, "blocks", shape="8+4") is None and value(made, "hits_total") == 2
        again = http.post("/v1/price", json=BODY).json()
        assert not again["from_stock"] and again["seconds_from_stock"] is None
        assert not http.post(TEXT, json=BODY).json()["crypten_llm"]["from_stock"], "the dealer follows again"


def test_a_session_from_stock(model, expected, tmp_path):
    folder = tmp_path / "stock"
    session, open_session = from_stock(folder, model)
    asked = {"input_ids": IDS, "max_new_tokens": 3, "eos_token_id": []}
    with open_session() as llama:
        first = session.producer.series
        exact, longer = Level(5, 4, 1).plan(), Level(9, 4, 1).plan()
        names = [
            put_all(session.producer, folder, plan, tmp_path / f"{at}")
            for at, plan in enumerate((longer, exact, exact))
        ]
        result = llama.generate(**asked, logprobs=0)
        assert result.block == names[1] and result.token_ids == expected.token_ids, "what wastes least comes first"
        assert [step.logprob for step in result.logprobs] == pytest.approx(
            [step.logprob for step in expected.logprobs], abs=0.02
        )
        with pytest.raises(RuntimeError):  # who leaves has used it
            for _ in llama.stream(**asked):
                raise RuntimeError
        owner = folder / "owner" / f"{names[0]}.block"
        assert owner.exists() and not (folder / "client" / f"{names[2]}.block").exists()
        live = llama.generate(**asked, prefill_chunk=4)
        assert live.block == "" and live.token_ids == expected.token_ids
    with open_session() as llama:  # the owner and the client have started anew
        assert session.producer.series == first and owner.exists()
        padded = llama.generate(**asked, logprobs=0)
        assert padded.block == names[0] and padded.token_ids == expected.token_ids
        assert [step.logprob for step in padded.logprobs] == pytest.approx(
            [step.logprob for step in expected.logprobs], abs=0.02
        )
        lone = put_all(session.producer, folder, exact, tmp_path / "lone")
        (folder / "owner" / f"{lone}.block").unlink()  # of which the owner has no half
        live = llama.generate(**asked)
        assert live.block == "" and live.token_ids == expected.token_ids
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("crypten_llm.session.stocked.GRACE_SECONDS", -1.0)
            llama.reconcile()
        assert not (folder / "client" / f"{lone}.block").exists()


def test_what_a_session_keeps_of_its_weights_is_no_blocks(tmp_path):
    """Norms of heads, else masked where they are first needed, and a public prefix that an earlier request has sent."""
    model, folder = tiny(tmp_path, model_type="qwen3", num_hidden_layers=1)[0], tmp_path / "stock"
    asked = {"input_ids": IDS, "max_new_tokens": 3, "eos_token_id": [], "public_prefix": [1, 2]}
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        expected = llama.generate(**asked, logprobs=0)
    session, open_session = from_stock(folder, model)
    with open_session() as llama:
        for blocks in (0, 2, 0):
            plan = Level(6, 4, 1, public_prefix=2).plan()
            names = [put_all(session.producer, folder, plan, tmp_path / f"out{blocks}{at}") for at in range(blocks)]
            for name in names or [""]:
                found = llama.generate(**asked, logprobs=0)
                assert (found.block, found.token_ids) == (name, expected.token_ids)
                likely = [[step.logprob for step in each.logprobs] for each in (found, expected)]
                assert likely[0] == pytest.approx(likely[1], abs=0.02)
                if name:
                    run = replace(plan, prompt_tokens=5, max_new_tokens=3, pads=1, public_prefix=(1, 2))
                    counted = predict(llama.config, run, from_stock=True)
                    assert found.cost.bytes_sent() == counted.cost.bytes_sent()
                    assert found.cost.dealer_bytes() == counted.cost.dealer_bytes()


def test_a_block_is_of_the_sessions_precision(model, tmp_path):
    """A producer deals for what the owner tells it; what another has dealt for the same weights is not used."""
    folder, asked = tmp_path / "stock", {"input_ids": IDS, "max_new_tokens": 3, "eos_token_id": []}
    session, open_session = from_stock(folder, model, precision="quantised")
    with open_session() as llama:
        live = llama.generate(**asked, logprobs=0)
        name = put_all(session.producer, folder, Level(5, 4, 1).plan(), tmp_path / "one")
        found = llama.generate(**asked, logprobs=0)
        assert (live.block, found.block) == ("", name)
        likely = [[step.logprob for step in each.logprobs] for each in (found, live)]
        assert likely[0] == pytest.approx(likely[1], abs=0.1)
        other = Producer(structs.replace(session.producer.series, precision="default"))
        put_all(other, folder, Level(5, 4, 1).plan(), tmp_path / "two")
        assert llama.generate(**asked).block == "", "it was dealt for other numbers"


def test_a_stock_is_of_the_engine_with_a_dealer(model, tmp_path):
    with pytest.raises(UsageError, match="leave --stock out, or --tape"):
        PrivateLlama.from_pretrained(str(model), engine="plain", stock=str(tmp_path))
