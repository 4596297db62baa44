"""Work on several processes: results in order, and an end to all of them however one of them ends."""

import os
import signal
import subprocess
import time

import pytest
from programs import Program, ended

from crypten_llm.errors import CryptenLLMError, UsageError
from experiments.tools.processes import processes


def late(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(why: str) -> None:
    raise UsageError(why)


def test_results_come_in_order_or_as_they_are_done():
    with processes(2, len, ()) as found:
        assert list(found.map(late, [1.0, 0.0, 0.1])) == [1.0, 0.0, 0.1]
        assert list(found.map(late, [1.0, 0.0, 0.1], ordered=False)) == [0.0, 0.1, 1.0]
        assert len(set(found.map(_pid, range(20)))) <= 2


def _pid(_) -> int:
    return os.getpid()


def test_an_error_is_the_callers_and_ends_the_others_at_once():
    started = time.monotonic()
    with pytest.raises(ValueError, match="must be non-negative"), processes(2, len, ()) as found:
        pids = set(found.map(_pid, range(20)))
        list(found.map(late, [600.0, -1.0, 600.0], ordered=False))
    assert time.monotonic() - started < 60
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_worker_that_cannot_start_says_why():
    """And is not started again for ever."""
    with pytest.raises(UsageError, match="no such folder"), processes(2, fail, "no such folder") as found:
        list(found.map(late, [0]))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_worker_that_is_killed_is_missed(ordered):
    with pytest.raises(CryptenLLMError, match="ended from outside, .*fewer --workers"), processes(2, len, ()) as found:
        list(found.map(die, range(4), ordered))


def test_processes_end_with_the_one_that_started_them():
    """Killed, it can tell them nothing."""
    text = "import sys; from experiments.tools.processes import processes; from time import sleep\n"
    text += "with processes(2, print, 'begun') as found: list(found.map(sleep, [0.5, 0.5])); "
    text += "print('ready', file=sys.stderr, flush=True); list(found.map(sleep, [600, 600]))"
    with Program("-c", text, stdout=subprocess.DEVNULL) as program:
        program.read_until("ready")
        program.wait_for(4)  # itself, two, and Python's tracker of their resources
        program.process.kill()
        program.process.wait()
        ended(program.process.pid, 30.0)
