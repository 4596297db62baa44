"""What holds for every test: one thread a process, parties that start at once, and which tests stay together.

And the fixtures that more than one file uses: a port, and connected transports.

Workers and parties share the cores, and threads that wait for each other spin.
"""

import gc
import os
from pathlib import Path

import pytest

# What is imported and collected stays until the end: half of the time that collecting takes would go to looking for
# cycles in it, again and again (see ``pytest_collection_finish``).
gc.disable()

# Before any test imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a session on engine ``plain`` takes all cores

# Files of which each test is work of its own for any worker; of the others all tests run in one, which share models.
SPLIT = {"test_notebooks.py", "test_launch.py"}
# What takes long comes first, so that no worker is left with it at the end.
LONG = (
    *("test_real_model.py", "test_notebooks.py", "test_launch.py", "test_kernels.py"),
    *("test_experiments_baselines.py", "test_api.py", "test_left_range.py", "test_engines.py", "test_generation.py"),
    *("test_wire_selection_policies.py", "test_reveal.py", "test_chat_command.py", "test_crypten_selection.py"),
)


@pytest.fixture(scope="session", autouse=True)
def parties_are_forked():
    """A session that a test opens in its own process starts its parties from a server that has imported all.

    They meet as often as that is quick, which no name server should have to follow.
    """
    import forked

    from crypten_llm.session import launch

    launch.start_party = forked.party
    forked.ask_no_name_server()


@pytest.fixture(scope="session", autouse=True)
def numba_has_its_types():
    """Numba reads its tables of types when it compiles first. Parties that are threads of one test, and find nothing
    compiled before, would have it do so several times at once, after which it may know no function of NumPy.
    """
    import numba
    import numpy as np

    numba.njit(lambda: np.empty((1, 2), np.uint64))()


@pytest.fixture(autouse=True)
def one_thread():
    """A session on engine ``plain`` takes all cores, and would leave the tests after it with as many threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def port():
    from programs import free_port

    return free_port()


@pytest.fixture
def mesh():
    """Makes the connected transports of ``world`` parties; closes them afterwards."""
    from transports import ROLES, socket_pair

    from crypten_llm.links.transport import Transport

    made = []

    def make(world=2, timeout=5.0, **options):
        sockets = [{} for _ in range(world)]
        for low in range(world):
            for high in range(low + 1, world):
                sockets[low][high], sockets[high][low] = socket_pair()
        made.extend(Transport(rank, ROLES[:world], sockets[rank], timeout=timeout, **options) for rank in range(world))
        return made[-world:]

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def against_raw():
    """A party (rank 0, owner) whose peer is a bare socket in the test's hands."""
    from transports import ROLES, socket_pair

    from crypten_llm.links.transport import Transport

    ours, theirs = socket_pair()
    transport = Transport(0, ROLES[:2], {1: ours}, timeout=0.5)
    yield transport, theirs
    transport.close()
    theirs.close()


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Half as many again as there are cores: tests that start parties also wait for them."""
    cores = len(os.sched_getaffinity(0))
    return cores + cores // 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        """``--dist loadfile``, but for the files of ``SPLIT``."""

        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return nodeid if Path(path).name in SPLIT else path

    return ByFile(config, log)
