"""What holds for every test: one thread a process, and parties that start at once.

Set before any test imports torch: workers and parties share the cores, and threads that wait for each other spin.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def parties_are_forked():
    """A session that a test opens in its own process starts its parties from a server that has imported all."""
    import forked

    from crypten_llm.session import launch

    launch.start_party = forked.party
