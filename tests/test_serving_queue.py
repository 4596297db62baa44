"""The queue in front of the session: whose turn it is, how much waits, and what becomes of those who leave."""

import json

import pytest
from endpoints import Paced, client, endpoint, listening, opened, send, service, until
from hf_models import with_tokenizer

from crypten_llm.errors import LeftRange, PartyError, UsageError
from crypten_llm.serving.fair_queue import Caller, FairQueue, QueueFull
from crypten_llm.serving.refusals import Refusal
from crypten_llm.serving.service import State
from crypten_llm.serving.stocking import Stocking

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("queued"))


def body(tokens=8, **more):
    return json.dumps({"prompt": "is", "max_tokens": tokens, **more})


def read(sock):
    """The answer, whole."""
    data = b""
    with sock:
        while piece := sock.recv(1 << 16):
            data += piece
    return data.decode()


def taken(queue):
    return [queue.take(0) for _ in range(len(queue))]


def test_keys_take_turns_and_users_within_a_key():
    queue = FairQueue(10)
    for number in range(4):
        queue.put(Caller("a", "x"), f"ax{number}")
    queue.put(Caller("a", "y"), "ay0")
    queue.put(Caller("b"), "b0")
    queue.put(Caller("b"), "b1")
    assert taken(queue) == ["ax0", "b0", "ay0", "b1", "ax1", "ax2", "ax3"]


def test_who_comes_later_waits_for_one_turn_and_not_for_all():
    queue = FairQueue(10)
    for number in range(3):
        queue.put(Caller(user="x"), f"x{number}")
    assert queue.take(0) == "x0"
    queue.put(Caller(user="y"), "y0")
    assert taken(queue) == ["x1", "y0", "x2"]


def test_room_is_of_each_key():
    queue = FairQueue(2)
    queue.put(Caller("a"), 1)
    queue.put(Caller("a", "other"), 2)
    with pytest.raises(QueueFull):
        queue.put(Caller("a"), 3)
    queue.put(Caller("b"), 4)
    assert queue.discard(2) and not queue.discard(2)
    queue.put(Caller("a"), 5)
    assert sorted(queue.close()) == [1, 4, 5] and queue.take(0) is None
    with pytest.raises(QueueFull):
        queue.put(Caller("c"), 6)
    assert len(queue) == 0


def test_nothing_comes_in_time():
    assert FairQueue(1).take(0.01) is None


def test_more_than_there_is_room_for_are_refused(model):
    paced = Paced(model)
    with service(paced, room=2) as made, listening(made) as address:
        asked = [send(address, TEXT, body(2)) for _ in range(1)]
        until(lambda: paced.begun == 1)
        asked += [send(address, TEXT, body(2)) for _ in range(2)]
        until(lambda: len(made.queue) == 2)
        refused = read(send(address, TEXT, body(2)))
        assert refused.startswith("HTTP/1.1 429") and "\r\nretry-after: " in refused and "queue_full" in refused
        assert paced.begun == 1
        paced.permit(9)  # of three: progress and two tokens
        assert all(read(each).startswith("HTTP/1.1 200") for each in asked)
        assert paced.begun == 3 and made.metrics.registry.get_sample_value(
            "crypten_llm_requests_total", {"outcome": "answered"}
        )


def test_a_request_joins_while_another_runs_and_ends_before_it(model):
    """And each has the answer that it has alone."""
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        long = send(address, TEXT, body(30, hide_length=False))
        until(lambda: paced.begun == 1)
        paced.permit(5)  # of one: its prompt, and four tokens
        until(lambda: paced.steps == 5)
        short = send(address, TEXT, json.dumps({"prompt": "The cat", "max_tokens": 2, "n": 2, "hide_length": False}))
        until(lambda: len(made.queue) == 1)
        gauges = [made.metrics.registry.get_sample_value(f"crypten_llm_{w}_requests") for w in ("waiting", "running")]
        assert gauges == [1, 1]
        paced.permit(60)
        brief = json.loads(read(short).partition("\r\n\r\n")[2])
        assert paced.begun == 3 and len(brief["choices"]) == 2 and brief["crypten_llm"]["beside"] == 1
        whole = json.loads(read(long).partition("\r\n\r\n")[2])
        assert whole["crypten_llm"]["beside"] == 2
        until(lambda: not made.running)
        with opened(model)() as alone:
            expected = alone.generate("is", max_new_tokens=30)
            assert whole["choices"][0]["text"] == expected.text
            assert brief["choices"][0]["text"] == alone.generate("The cat", max_new_tokens=2).text
        value = made.metrics.registry.get_sample_value
        assert value("crypten_llm_requests_total", {"outcome": "answered"}) == 2
        assert value("crypten_llm_completion_tokens_total") == len(expected.token_ids) + 4


def test_who_is_answered_by_itself_waits_for_the_others_and_they_for_it(model, monkeypatch):
    """As a request from stock is; the order in which they came stays."""
    monkeypatch.setattr(Stocking, "takes", lambda self, llama, job, others=0: job.asked[0].plan.max_new_tokens == 3)
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        long = send(address, TEXT, body(9, hide_length=False))
        until(lambda: paced.begun == 1)
        apart = send(address, TEXT, body(3))
        until(lambda: len(made.queue) == 1)
        paced.permit(3)
        until(lambda: len(made.running) == 2)
        third = send(address, TEXT, body(2))
        until(lambda: len(made.queue) == 1)
        assert len(made.running) == 2 and paced.begun == 1, "nobody joins once it waits"
        paced.permit(50)
        for each in (long, apart, third):
            answer = json.loads(read(each).partition("\r\n\r\n")[2])
            assert answer["crypten_llm"]["beside"] == 0 and not answer["crypten_llm"]["from_stock"]
        until(lambda: not made.running)
        assert paced.begun == 2, "it is in no batch"


def test_one_at_a_time_where_that_is_asked_for(model):
    paced = Paced(model)
    with service(paced, together=1) as made, listening(made) as address:
        asked = [send(address, TEXT, body(2)) for _ in range(2)]
        paced.permit(30)
        for each in asked:
            assert json.loads(read(each).partition("\r\n\r\n")[2])["crypten_llm"]["beside"] == 0


def test_who_leaves_beside_others_leaves_them_alone(model):
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        asked = [send(address, TEXT, body(20, hide_length=False)) for _ in range(3)]
        until(lambda: len(made.queue) + paced.begun >= 3)
        paced.permit(12)
        until(lambda: paced.steps == 12 and paced.begun == 3)
        asked[1].close()
        until(lambda: sum(job.left for job in made.running) == 1)
        paced.permit(100)
        texts = [json.loads(read(asked[place]).partition("\r\n\r\n")[2])["choices"][0]["text"] for place in (0, 2)]
        assert texts[0] == texts[1]
        until(lambda: not made.running)
        value = made.metrics.registry.get_sample_value
        assert value("crypten_llm_requests_total", {"outcome": "left"}) == 1
        assert value("crypten_llm_requests_total", {"outcome": "answered"}) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_a_running_request_ends_it_at_the_next_token(model, stream):
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        left = send(address, TEXT, body(50, stream=stream))
        until(lambda: paced.begun == 1)
        paced.permit(3)
        until(lambda: paced.steps == 3)
        (running,) = made.running
        left.close()
        until(lambda: running.left)
        paced.permit(1)  # the step that was under way
        until(lambda: not made.running)
        assert paced.steps <= 4 and paced.llama.party.reveals.tokens <= 5
        next_one = send(address, TEXT, body(1))
        paced.permit(2)
        assert read(next_one).startswith("HTTP/1.1 200")


def test_who_leaves_the_queue_is_never_run(model):
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        first = send(address, TEXT, body(1))
        until(lambda: paced.begun == 1)
        gone = send(address, TEXT, body(1, stream=True))
        until(lambda: len(made.queue) == 1)
        gone.close()
        until(lambda: len(made.queue) == 0)
        paced.permit(4)
        assert read(first).startswith("HTTP/1.1 200")
        until(lambda: not made.running)
        assert paced.begun == 1


def test_nothing_is_taken_before_the_model_is_shared_nor_after_it_could_not_be(model):
    def fail():
        raise UsageError("no such folder; give another")

    ended = []
    with service(fail, ended=lambda: ended.append(True)) as made:
        http = client(made)
        health = http.get("/health")
        assert health.status_code == 503 and health.json()["state"] == "Failed"
        answer = http.post(TEXT, content=body(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 503 and "no such folder" in answer.json()["error"]["message"]
        assert isinstance(made.error, UsageError) and ended


def failing(model, error, ends):
    """Opens sessions of which the first raises ``error`` at its first request; ends: whether it has ended then."""
    openings = []

    def open_session():
        llama = opened(model)()
        openings.append(llama)
        if len(openings) == 1:

            def open_batch(*arguments):
                if ends:
                    type(llama).is_open = property(lambda self: self is not openings[0])
                raise error

            llama.open_batch = open_batch
        return llama

    return open_session, openings


@pytest.fixture
def kept_property(monkeypatch):
    from crypten_llm import PrivateLlama

    monkeypatch.setattr(PrivateLlama, "is_open", PrivateLlama.is_open)


@pytest.mark.parametrize(
    "error, ends, status, state",
    [
        (UsageError("too large; ask for less"), False, 400, State.AVAILABLE),
        (PartyError("rank 0 (owner) closed the connection"), True, 503, State.FAILED),
        (LeftRange("attention scores left the range"), True, 422, State.AVAILABLE),
    ],
)
def test_a_request_that_fails(model, kept_property, error, ends, status, state):
    open_session, openings = failing(model, error, ends)
    with service(open_session, reopens=True) as made:
        http = client(made)
        answer = http.post(TEXT, json={"prompt": "is", "max_tokens": 1})
        assert answer.status_code == status and str(error) in answer.json()["error"]["message"]
        until(lambda: made.state is state)
        assert len(openings) == (2 if status == 422 else 1)
        again = http.post(TEXT, json={"prompt": "is", "max_tokens": 1})
        assert again.status_code == {422: 200, 400: 400, 503: 503}[status]


@pytest.mark.parametrize("ends", [False, True])
def test_the_endpoint_ends_with_its_session_where_that_is_wanted(model, kept_property, ends):
    open_session, _ = failing(model, PartyError("rank 0 (owner) closed the connection"), True)
    told = []
    with service(open_session, ends=ends, ended=lambda: told.append(True)) as made:
        assert client(made).post(TEXT, json={"prompt": "is", "max_tokens": 1}).status_code == 503
        until(lambda: made.state is State.FAILED and (not ends or bool(told)))
        assert isinstance(made.error, PartyError) is bool(told) is ends


def test_an_error_within_a_stream_is_its_last_piece(model):
    open_session, _ = failing(model, UsageError("too large; ask for less"), False)
    with service(open_session) as made:
        answer = client(made).post(TEXT, json={"prompt": "is", "max_tokens": 1, "stream": True})
        (event,) = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
        assert json.loads(event.removeprefix("data: "))["error"]["message"] == "too large; ask for less"


def test_what_waits_when_the_endpoint_is_stopped_hears_it(model):
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        asked = [send(address, TEXT, body(9))]
        until(lambda: paced.begun == 1)
        asked.append(send(address, TEXT, body(9)))
        until(lambda: len(made.queue) == 1)
        made.stop()
        paced.permit(3)
        assert all(read(each).startswith("HTTP/1.1 503") for each in asked)
    assert endpoint(made).service.state is State.AVAILABLE


def test_what_comes_as_the_session_ends_is_not_left_to_wait(model):
    """Between the look at the state and the queue, which is closed by then."""
    with service(opened(model)) as made:
        http, ready = client(made), made.ready
        looks = iter([ready, ready])

        def look():
            found = next(looks, None)
            if found is None:
                raise Refusal(503, "the parties have ended")
            return found()

        made.ready = look
        made.queue.close()
        answer = http.post(TEXT, json={"prompt": "is", "max_tokens": 1})
        assert answer.status_code == 503 and answer.json()["error"]["message"] == "the parties have ended"
        made.ready = ready
        made.stop()
        answer = http.post(TEXT, json={"prompt": "is", "max_tokens": 1})
        assert answer.json()["error"]["code"] == "stopping"
