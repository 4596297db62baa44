"""The price before a request is sent: what it says is what the request then costs."""

import json
import threading
from types import SimpleNamespace

import pytest
from endpoints import Paced, client, opened, predicted, service, until
from hf_models import with_template

from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.refusals import Refusal
from crypten_llm.session.plan import Course, Plan

CHAT, PRICE = "/v1/chat/completions", "/v1/price"
SAID = [{"role": "user", "content": "The passkey is 4711."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("priced"))


@pytest.fixture(scope="module")
def made(model):
    """Owner, client and dealer."""
    with service(opened(model, engine="wire", progress=False), predict=predicted, engine="wire") as made:
        yield made


@pytest.mark.parametrize(
    "more",
    [
        {"stream": True},
        {"hide_length": False, "n": 2},
        {},  # whole, and so of hidden length
        {"stream": True, "policy": "h2o"},
    ],
)
def test_rounds_bytes_and_material_are_exact(made, more):
    http, body = client(made), {"messages": SAID, "max_tokens": 3, **more}
    price, count = http.post(PRICE, json=body).json(), more.get("n", 1)
    answer = http.post(CHAT, json=body)
    if more.get("stream"):
        (line,) = [line for line in answer.text.split("\n\n") if "crypten_llm" in line]
        cost = json.loads(line.removeprefix("data: "))["crypten_llm"]
    else:
        cost = answer.json()["crypten_llm"]
        assert answer.json()["usage"]["completion_tokens"] == 3 * count
        assert price["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"] * count
    for name in ("rounds", "bytes_sent", "dealer_bytes"):
        assert price[name] == cost[name] and price[name], name
    assert price["max_new_tokens"] == 3 * count and price["seconds"] > 0 and price["queue_seconds"] == 0


def test_seconds_are_those_of_this_machine_once_a_priced_request_was_answered(made):
    http, body = client(made), {"messages": SAID, "max_tokens": 4, "stream": True}
    http.post(PRICE, json=body)
    for _ in range(2):
        http.post(CHAT, json=body)
    price = http.post(PRICE, json=body).json()
    assert price["basis"] == "measured"
    counted = sum(price[phase]["seconds"] for phase in ("prefill", "decode"))
    assert price["seconds"] == pytest.approx(counted)


def test_a_deadline_that_would_be_missed_is_refused_with_the_price(made):
    http, body = client(made), {"messages": SAID, "max_tokens": 3}
    refused = http.post(CHAT, json={**body, "stream": True}, headers={"X-Deadline": "0.000001"})
    assert refused.status_code == 412
    assert refused.json()["error"]["code"] == "deadline"
    assert refused.json()["price"] == http.post(PRICE, json={**body, "stream": True}).json()
    assert http.post(CHAT, json=body, headers={"X-Deadline": "600"}).status_code == 200
    for text in ("soon", "-1", "nan", "inf"):
        assert http.post(CHAT, json=body, headers={"X-Deadline": text}).status_code == 400


def test_what_waits_counts_for_a_deadline(model):
    paced = Paced(model)
    with service(paced, predict=predicted, engine="wire") as made:
        http = client(made)
        first = threading.Thread(target=http.post, args=(CHAT,), kwargs={"json": {"messages": SAID, "max_tokens": 2}})
        first.start()
        until(lambda: made.running)
        price = http.post(PRICE, json={"messages": SAID, "max_tokens": 2}).json()
        assert price["queue_seconds"] == pytest.approx(price["seconds"])
        paced.permit(3)
        first.join()


class Counted:
    """A prediction of one second for the prefill and two for its two steps."""

    decode_steps = 2

    def phase(self, name):
        seconds = {"prefill": 1.0, "decode": 2.0}[name]
        return {"rounds": 1, "bytes_sent": [1, 2], "dealer_bytes": 3, "seconds": seconds}


def test_ratios_are_medians_and_a_step_weighs_as_one():
    plan, pricer = Course(Plan(4, 3)), Pricer(lambda config, courses: Counted(), "wire")
    assert pricer.price(None, [plan])["seconds"] == 3.0 and pricer.price(None, [plan])["basis"] == "estimated"
    for prefill in (100.0, 2.0, 2.0):  # the first compiles kernels
        took = {"prefill": prefill, "decode": 3.0}  # one step, which was predicted to take one second
        pricer.learn(plan, SimpleNamespace(token_ids=[1, 2], cost=SimpleNamespace(seconds=took.get)))
    price = pricer.price(None, [plan, plan])
    assert price["seconds"] == 2.0 * 1.0 + 3.0 * 2.0 and price["basis"] == "measured"
    assert price["bytes_sent"] == [2, 4] and price["rounds"] == 2 and price["dealer_bytes"] == 6
    with pytest.raises(Refusal, match="the answer may take 8.0 s"):
        pricer.check(price, 7.9)
    pricer.check(price, 8.1)
