"""Whatever reads what others have written takes any bytes: it returns, or raises the project's own error in one line.

A thousand mutated inputs each, in seconds; `make test-slow` takes 10^5 each. How they are made is in ``fuzzing``.
"""

import fuzzing
import pytest
from fuzz_readers import READERS
from fuzzing import Reader, in_time, limited, mutated, run

from crypten_llm.errors import UsageError


@pytest.mark.parametrize("name", READERS)
def test_a_thousand_inputs(name):
    taken, refused = run(name, READERS[name](), 1000, seed=1)
    assert refused > 100 and taken + refused == 1000


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", READERS)
def test_a_hundred_thousand_inputs(name):
    assert sum(run(name, READERS[name](), 100_000, seed=2)) == 100_000


def test_an_input_can_be_made_again():
    reader = READERS["message"]()
    made = [mutated(reader, 1, number) for number in range(50)]
    assert made == [mutated(reader, 1, number) for number in range(50)] and len(set(made)) > 40


@pytest.mark.parametrize("fault", [KeyError("a"), MemoryError(), RecursionError(), AssertionError()])
def test_another_error_is_found(fault):
    def read(data):
        if data != b"[1]":
            raise fault

    with pytest.raises(AssertionError, match="odd 3 "):
        run("odd", Reader((b"[1]",), read), 20, seed=3)


def test_a_hang_and_memory_are_found(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    with pytest.raises(fuzzing.Hang), in_time():
        while True:
            pass
    with pytest.raises(MemoryError), limited():
        bytearray(2 << 30)
    with in_time(), limited(), pytest.raises(UsageError):
        raise UsageError("nothing of the kind")
