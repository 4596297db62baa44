"""Engine ``wire`` on another device: a role's tensors are all there, and what travels is all that comes from it.

The device is one that this machine has not (``second_device``): the processor by another name, on which a tensor that
was made without naming the device meets another as it would on a GPU, and fails. Its kernels are the processor's.
"""

import hashlib
import inspect
import itertools
from contextlib import nullcontext

import pytest
import torch
from hf_models import EVERY_CASE, tiny
from policy_table import ROWS
from second_device import DEVICE, SecondDevice, is_there
from torch.utils._pytree import tree_leaves, tree_map

from crypten_llm.commands.deal import deal
from crypten_llm.commands.doctor import write_tiny
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.operations import OPERATIONS
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.kernels import cpu, ring
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols import selection
from crypten_llm.protocols.comparison import ordered
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import Secret
from crypten_llm.roles import CLIENT, DEALER
from crypten_llm.session.mode import Mode
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, parse_policy
from crypten_llm.session.prompted import Answer

HERE = torch.device("cpu")
IDS = list(range(3, 17))


class Kernels:
    """The processor's kernels for tensors of ``DEVICE`` alone."""

    def __getattr__(self, name):
        kernel = getattr(cpu, name)

        def run(*given):
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            assert all(map(is_there, tensors)), f"{name} is given a tensor of the processor"
            with torch._C.DisableTorchFunction():
                out = kernel(*tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, given))
            return marked(out)

        assert inspect.isfunction(kernel)
        return run

    class KeyStream:
        def __init__(self, key):
            self._stream = cpu.KeyStream(key)

        def fill(self, count):
            return marked(self._stream.fill(count))


def marked(out):
    for leaf in tree_leaves(out):
        leaf.there = True
    return out


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(ring, "on", lambda device: Kernels() if torch.device(device) == DEVICE else cpu)


@pytest.fixture
def same_keys(monkeypatch):
    """Runs alike to the last bit."""
    drawn = itertools.count()
    monkeypatch.setattr(roles, "fresh_key", lambda: hashlib.sha256(str(next(drawn) % 2).encode()).digest())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"))


def ask(transport, devices, folder, plans, tape=None):
    """A session with a request of each plan: at the client what it was shown at each step."""
    with nullcontext() if set(devices) == {HERE} else SecondDevice():
        material = None if tape is None else Tape(tape, transport.rank, transport, is_local=True)
        engine = WireEngine(transport, Mode.parse(plans[0].reveal).wire(), material, device=devices[transport.rank])
        party = Party(engine, transport, compute_parties=2, mode=Mode.parse(plans[0].reveal))
        if not party.is_client:
            party.serve(folder)
            return None
        party.request_load()
        shown = []

        def choose(given):
            assert not is_there(given)
            shown.append(given)
            return 3

        for plan in plans:
            for _ in party.request_generate(plan, Answer(IDS[: plan.prompt_tokens], choose)):
                pass
        party.close()
    return shown


def run(devices, folder, *plans):
    return run_roles(lambda transport: ask(transport, devices, folder, plans), timeout=60.0)


def test_it_says_the_same_wherever_its_parties_are(folder, same_keys):
    plan = Plan(10, 2, chunk=6)
    expected = run([HERE] * 3, folder, plan)[CLIENT]
    for devices in ([DEVICE] * 3, [DEVICE, HERE, HERE], [HERE, DEVICE, DEVICE]):
        shown = run(devices, folder, plan)[CLIENT]
        assert len(shown) == len(expected) == 2
        assert all(map(torch.equal, shown, expected))


@pytest.mark.parametrize("reveal", ["tokens", "top-5"])
def test_choices_on_shares(reveal, folder, same_keys):
    plans = [Plan(5, 2, reveal=reveal)]
    if reveal == "tokens":
        plans.append(Plan(5, 1, reveal=reveal, temperature=0.7))
    expected, shown = (run([device] * 3, folder, *plans)[CLIENT] for device in (HERE, DEVICE))
    assert all(map(torch.equal, shown, expected))


class Noting(WireEngine):
    """Which operations it was asked for."""

    asked: set = set()

    def __getattribute__(self, name):
        if name in OPERATIONS:
            self.asked.add(name)
        return super().__getattribute__(name)


def test_every_operation(folder, same_keys, monkeypatch):
    """By what the model and four policies do, and the choices above."""
    monkeypatch.setitem(globals(), "WireEngine", Noting)
    policies = [f"{name}({ROWS[name].small})" for name in ("mikv", "lazyeviction", "mpcache", "quest")]
    plans = [Plan(14, 1, policy=str(parse_policy(policy))) for policy in policies]
    expected, shown = (run([device] * 3, folder, *plans)[CLIENT] for device in (HERE, DEVICE))
    assert all(map(torch.equal, shown, expected))
    assert Noting.asked | {"sample", "top_k"} == set(OPERATIONS)


@pytest.mark.parametrize("count", [1, 5])
def test_choices_among_many(count):
    """By a tournament, and by a search."""
    numbers = torch.randperm(300, generator=torch.Generator().manual_seed(0)) - 150

    def largest(transport):
        with SecondDevice():
            runtime = roles.make(transport, device=DEVICE)
            rounds = Rounds(runtime)
            runtime.begin("choice")
            given = Secret(runtime.public(numbers), 0, 64, 8)
            (wire,) = rounds.open(ordered(given, 16, "test"))
            found = rounds.run(selection.top(runtime, wire, count, 256))
            runtime.end()
            return None if transport.rank == DEALER else (found.share.cpu(), found.width)

    (owner, width), (client, _), _ = run_roles(largest, timeout=30.0)
    assert ring.low_bits(owner + client, width).nonzero()[:, 0].equal(numbers.topk(count).indices.sort().values)


@pytest.mark.parametrize("dealer", [HERE, DEVICE], ids=["dealt here", "dealt there"])
def test_a_tape(dealer, folder, tmp_path):
    plan, said = Plan(5, 2), []
    with SecondDevice():
        deal(plan, tmp_path / "tape", LlamaConfig.from_folder(folder), say=said.append, device=dealer)

    def play(transport):
        return ask(transport, [DEVICE] * 2, folder, [plan], tmp_path / "tape") if transport.rank != DEALER else None

    expected, shown = run([HERE] * 3, folder, plan)[CLIENT], run_roles(play, timeout=30.0)[CLIENT]
    torch.testing.assert_close(torch.stack(shown), torch.stack(expected), atol=1e-2, rtol=0)


def test_biases_and_norms_of_heads(same_keys, tmp_path):
    folder, _ = tiny(tmp_path, **EVERY_CASE["qwen3_options"])
    expected, shown = (run([device] * 3, folder, Plan(5, 2))[CLIENT] for device in (HERE, DEVICE))
    assert all(map(torch.equal, shown, expected))


def test_a_public_prefix(folder, same_keys):
    plan = Plan(5, 2, public_prefix=(7, 8, 9))
    expected, shown = (run([device] * 3, folder, plan)[CLIENT] for device in (HERE, DEVICE))
    assert all(map(torch.equal, shown, expected))
