"""How many tokens an owner answers with: refused before anything is shown, counted over sessions, given back."""

import json
from datetime import UTC, datetime
from threading import Thread

import pytest
from hf_models import tiny

from crypten_llm import PrivateLlama
from crypten_llm.errors import CryptenLLMError, UsageError, public_words
from crypten_llm.session.quota import Quota, count_file
from crypten_llm.session.settings import LaunchConfig


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def use(quota, asked, shown=None):
    with quota.taken([asked], lambda: asked if shown is None else shown):
        pass


def session(model="model", **most):
    quota = Quota(**most)
    quota.begin(model)
    return quota


def counted(model="model"):
    return json.loads(count_file(model).read_text())["tokens"]


def test_a_session_has_its_tokens_and_no_more():
    quota = session(session=10)
    use(quota, 6, shown=2)
    use(quota, 8)
    with pytest.raises(UsageError, match="with 10 tokens a session, of which 0 are left, and 1 are asked for; ask for"):
        use(quota, 1)
    use(session(session=10), 10)
    assert not count_file("model").exists(), "nothing is kept of what has no limit a day"


def test_a_day_is_counted_over_sessions_and_models_apart(monkeypatch):
    use(session(day=10), 6, shown=5)
    use(session("another", day=10), 10)
    with pytest.raises(UsageError, match="with 10 tokens a day .UTC., of which fewer than the 6 that are asked for"):
        use(session(day=10), 6)
    assert counted() == 5
    use(session(day=10), 5)
    path = count_file("model")
    path.write_text(json.dumps({"day": "2000-01-01", "tokens": 10}))
    use(session(day=10), 7)
    assert counted() == 7 and path.stat().st_mode & 0o777 == 0o600


def test_what_was_shown_before_an_error_is_counted():
    with pytest.raises(ValueError), session(day=10).taken([3, 5], lambda: 3):
        raise ValueError
    assert counted() == 3


def test_a_process_that_is_killed_has_counted_all_that_it_might_have_shown():
    with session(day=10).taken([3, 5], lambda: 0):
        assert counted() == 8


def test_sessions_side_by_side_share_the_count():
    def some():
        for _ in range(20):
            use(session(day=1000), 2, shown=1)

    threads = [Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted() == 80


@pytest.mark.parametrize("answers", [[-5], [0], [9, -8], [True], ["2"], [2.5]])
def test_a_client_cannot_ask_for_less_than_it_takes(answers):
    """A negative length would make room in the count, and an answer that never reaches it would not end."""
    with pytest.raises(UsageError, match="an answer of .* tokens is asked for; it must be 1 or more"):
        with session(session=10).taken(answers, lambda: 0):
            raise AssertionError("it was begun")


@pytest.mark.parametrize("text", ["x", "[]", '{"day": 1, "tokens": 2}', '{"day": "a", "tokens": -1}', "[" * 50_000])
def test_what_is_no_count_is_not_begun_anew(text):
    path = count_file("model")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UsageError, match="is no count of a day's tokens; remove it to count from zero") as found:
        use(session(day=10), 1)
    assert str(path) not in public_words(found.value), "a path is the owner's own"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(UsageError, match="cannot count the day's tokens in .*: .*; make it writable"):
        use(session(day=10), 1)


@pytest.mark.parametrize("wrong", [-1, True, 2.5, "3"])
def test_what_is_no_limit(wrong):
    with pytest.raises(UsageError, match="day_tokens is .*; give 1 or more, or 0 for no limit"):
        LaunchConfig(day_tokens=wrong)


def test_the_owner_of_a_run_refuses_what_is_too_much(tmp_path):
    """A request that fits is answered, what it did not need is given back, and all parties hear why one ends."""
    folder = str(tiny(tmp_path, num_hidden_layers=1)[0])
    asked = {"input_ids": [5, 6, 7], "max_new_tokens": 4}
    with PrivateLlama.from_pretrained(folder, session_tokens=9, day_tokens=90, timeout=60, threads=1) as llama:
        ids = llama.generate(**asked).token_ids
        stopped = llama.generate(**asked, eos_token_id=ids[0], hide_length=False)
        assert len(stopped.token_ids) == 1 and counted(folder) == 5
        with pytest.raises(
            CryptenLLMError, match=r"rank 0 \(owner\) stopped: this owner answers with 9 tokens a session"
        ):
            llama.generate(input_ids=[5, 6], max_new_tokens=5)
    assert counted(folder) == 5
    assert datetime.now(UTC).date().isoformat() in count_file(folder).read_text()
    assert len(list(count_file(folder).parent.iterdir())) == 1, "the owner alone counts"
