"""How a ``PrivateLlama`` session ends: what is asked afterwards is refused, and what the other parties hear of it."""

import pytest
from hf_models import with_tokenizer

from crypten_llm import PrivateLlama
from crypten_llm.errors import ENDED, PartyError, UsageError
from crypten_llm.session.bench import Shape
from crypten_llm.session.prompted import Step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("endings"))


def refuses_requests(llama):
    with pytest.raises(UsageError, match="this session has ended, .* open another"):
        llama.generate(input_ids=[5], max_new_tokens=1)
    with pytest.raises(UsageError, match="this session has ended, .* open another"):
        llama.bench(Shape(16, 2, 1, 24))


def test_a_session_that_is_closed_while_a_stream_is_held(model):
    with PrivateLlama.from_pretrained(str(model), timeout=60, threads=1) as llama:
        processes = llama._children.processes
        events = llama.stream(input_ids=[5, 6, 7], max_new_tokens=20)
        next(event for event in events if isinstance(event, Step))
        with pytest.raises(UsageError, match="still being read"):
            llama.bench(Shape(16, 2, 1, 24))
    assert {rank: process.returncode for rank, process in processes.items()} == {0: 0, 2: 0}
    with pytest.raises(UsageError, match="this session has ended"):
        next(events)
    refuses_requests(llama)
    llama.close()


def test_a_session_that_ended_with_an_error_while_a_stream_is_held(model):
    with (
        pytest.raises(ZeroDivisionError),
        PrivateLlama.from_pretrained(str(model), timeout=60, threads=1) as llama,
    ):
        events = llama.stream(input_ids=[5, 6, 7], max_new_tokens=20)
        next(events)
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="this session has ended"):
        next(events)
    refuses_requests(llama)


class Listener:
    """In the place of the links: what the other parties hear when the session ends with an error."""

    def __init__(self):
        self.heard = []

    def abort(self, words):
        self.heard.append(words)


def asks_wrong_ids_in_a_batch(llama):
    llama.generate(input_ids=[[5, 6], [991171, 7]])


def asks_a_wrong_id(llama):
    llama.generate(input_ids=[5, 991171])


def opens_a_file(_):
    open("/nowhere/patients/1171")


def fails_otherwise(_):
    raise KeyError("1171")


def fails_as_another_session_does(_):
    raise PartyError("rank 0 (owner) stopped: 1171")


def lacks_a_package(_):
    raise ModuleNotFoundError("no 1171", name="1171")


def samples_what_overflowed(llama):
    with llama._guarded():
        raise UsageError("the token after 1171")


@pytest.mark.parametrize(
    "mistake",
    [
        *(asks_wrong_ids_in_a_batch, asks_a_wrong_id, opens_a_file, fails_otherwise, fails_as_another_session_does),
        *(lacks_a_package, samples_what_overflowed),
    ],
)
def test_the_others_hear_nothing_of_what_the_client_knows(model, mistake):
    listener = Listener()
    with (
        pytest.raises((UsageError, OSError, KeyError, PartyError, ImportError)),
        PrivateLlama.from_pretrained(str(model), engine="plain") as llama,
    ):
        llama._transport = listener
        mistake(llama)
    assert listener.heard == [ENDED]


def test_the_others_hear_what_parties_say_of_each_other(model):
    listener = Listener()
    with (
        pytest.raises(PartyError),
        PrivateLlama.from_pretrained(str(model), engine="plain") as llama,
    ):
        llama._transport = listener
        with llama._guarded():
            raise PartyError("rank 2 (dealer) closed the connection")
    assert listener.heard == ["rank 2 (dealer) closed the connection"]
