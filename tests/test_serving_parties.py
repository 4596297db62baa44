"""``serve --local`` with all its parties: a private answer, and parties that end while and before one is asked."""

import json
import os
import re
import signal
import threading

import httpx2
import pytest
from endpoints import SERVE, client, opened, program, service, until
from programs import by_hand
from ranged_models import TRIGGER, triggered

from crypten_llm import PrivateLlama

DOCUMENT = "Document 1: Kenji has a job at Indigo.\nDocument 2: The head office of Indigo is in Bristol.\n"
PROMPT = f"{DOCUMENT}Question: In which city does Kenji work?\nAnswer:"


@pytest.fixture
def served():
    with program("--local") as (served, url), httpx2.Client(base_url=url, timeout=60) as http:
        served.read_until("requests are answered")
        yield served, http


def health(http):
    return http.get("/health").json()


def test_a_private_answer_and_a_party_that_dies_in_the_next(served):
    started, http = served
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    price = http.post("/v1/price", json={**body, "stream": True}).json()
    found = http.post("/v1/completions", json=body).json()
    with PrivateLlama.from_pretrained(engine="plain", threads=1) as llama:
        assert found["choices"][0]["text"] == llama.generate(PROMPT, max_new_tokens=8).text == " Bristol"
    assert found["crypten_llm"]["bytes_sent"][0] == price["bytes_sent"][0] > 0  # the owner sends no decision
    assert any(entry["to"] == "client" for entry in found["crypten_llm"]["revealed"])

    lines = []

    def read():
        asked = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "stop": None}
        with http.stream("POST", "/v1/completions", json=asked | {"hide_length": True}) as answer:
            lines.extend(answer.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: health(http)["running"] == 1)
    later = http.post("/v1/price", json={**body, "stream": True}).json()  # counted anew beside a request that runs
    more = http.post("/v1/price", json={**body, "max_tokens": 9, "stream": True}).json()
    assert later["bytes_sent"] == price["bytes_sent"] and later["queue_seconds"] > 0
    assert more["rounds"] > later["rounds"]
    waiting = []
    waiter = threading.Thread(target=lambda: waiting.append(http.post("/v1/completions", json=body)))
    waiter.start()
    until(lambda: sum(health(http)[name] for name in ("waiting", "running")) == 2)  # it may have joined already
    os.kill(started.pid_of(0), signal.SIGKILL)
    reader.join(30)
    waiter.join(30)
    (error,) = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert "rank 0 (owner) was ended by SIGKILL" in error["error"]["message"]
    assert "[DONE]" not in "".join(lines)
    assert waiting[0].status_code == 503 and "SIGKILL" in waiting[0].json()["error"]["message"]
    found = http.get("/health")
    assert found.status_code == 503
    assert found.json()["state"] == "Failed" and "SIGKILL" in found.json()["reason"]
    assert http.post("/v1/completions", json=body).status_code == 503
    assert 'crypten_llm_state="Failed"} 1.0' in http.get("/metrics").text
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.finish()
    assert code == 0 and "Traceback" not in err


def test_a_party_that_dies_while_nothing_is_asked(served):
    started, http = served
    os.kill(started.pid_of(2), signal.SIGKILL)
    until(lambda: health(http)["state"] == "Failed")
    assert "rank 2 (dealer) was ended by SIGKILL" in health(http)["reason"]


def test_parties_that_others_have_started():
    """Each by the same command; the client's is the endpoint, and its end is that of all."""
    owner, client, dealer = by_hand(3, *SERVE)
    with owner, client, dealer:
        url = re.search(r"endpoint (\S+)/v1", client.read_until("endpoint "))[1]
        client.read_until("requests are answered")
        body = {"prompt": PROMPT, "max_tokens": 2, "stream": False}
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"].startswith(" Bristol")
        client.process.send_signal(signal.SIGINT)
        for party in (owner, client, dealer):
            code, _, err = party.finish()
            assert code == 0, err


def test_a_prompt_that_leaves_the_range_ends_its_session_and_not_the_endpoint(tmp_path):
    model = triggered(tmp_path, 72.0)
    with service(opened(model, engine="wire"), reopens=True) as made:
        http, first = client(made), made.llama
        asked = {"max_tokens": 2, "hide_length": False}
        refused = http.post("/v1/completions", json={"prompt": [11, TRIGGER, 12], **asked})
        assert refused.status_code == 422 and refused.json()["error"]["code"] == "left_range"
        until(lambda: health(http)["state"] == "Available" and made.llama is not first, 30)
        assert not first.is_open
        answer = http.post("/v1/completions", json={"prompt": [11, 12, 13], **asked})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
