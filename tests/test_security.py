"""What must never happen: a secret opened elsewhere, predictable randomness, a dealer that learns data."""

import ast
from pathlib import Path

import party_jobs
import pytest
import torch
from hf_models import tiny
from parties import run

ROOT = Path(__file__).parents[1]
OPENING = {"open_to", "get_plain_text", "reveal", "plain_text"}
IDS = [5, 6, 7]
REQUEST = ({"prompt_tokens": 3, "max_new_tokens": 2}, IDS, {}, ())


def openings(path: Path) -> list[tuple[str, str]]:
    """(enclosing function, opening called) for every call in ``path`` that can make a secret readable."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OPENING:
            found.append((function, node.func.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text("utf-8")), "")
    return found


def test_only_the_reveal_module_opens_secrets():
    files = [*ROOT.glob("crypten_llm/**/*.py"), *ROOT.glob("eviction/**/*.py")]
    assert len(files) > 20
    for path in files:
        for function, opening in openings(path):
            # An engine's open_to is the protocol of an opening; reveal.py alone decides that one happens.
            is_protocol = "engines" in path.parts and function == "open_to" and opening != "open_to"
            assert path.name == "reveal.py" or is_protocol, f"{path.name}: {function} calls {opening}"
    assert openings(ROOT / "crypten_llm/session/reveal.py") == [("open_to_client", "open_to")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [str(tiny(tmp_path_factory.mktemp("m"), num_hidden_layers=1, seed=seed)[0]) for seed in (0, 1)]


def test_torch_generators_make_no_share(models):
    # The owner's calibration draws public tokens; everything after the load is forbidden to draw from torch.
    tokens = run(party_jobs.generate_without_torch_randomness, models[0], REQUEST)
    assert len(tokens[1]) == 2


def test_the_forbidden_generators_would_be_noticed():
    with pytest.raises(AssertionError, match="torch.randint was used"):
        run(party_jobs.use_forbidden_randomness)


def test_shares_are_fresh_and_add_up():
    owner, client = run(party_jobs.shares_of_zero, 2)
    for mine, theirs in zip(owner, client, strict=True):
        assert torch.equal(mine + theirs, torch.zeros_like(mine))
    assert not torch.equal(owner[0], owner[1])
    # Uniform in the ring: of 10,000 top bits about half are set (8 standard deviations).
    for share in (owner[0], client[0]):
        assert abs((share < 0).sum().item() - 5000) < 400


def test_no_key_stream_is_read_twice():
    for draws in run(party_jobs.stream_draws):
        assert len(draws) > 10
        read_up_to = {}
        for stream, start, count in draws:
            assert start == read_up_to.get(stream, 0)
            read_up_to[stream] = start + count


def test_what_is_opened_looks_random_and_never_repeats():
    """The same product twice: what the other party is sent differs in every element."""
    first, second = run(party_jobs.sent_in_two_products)[0]
    assert first.shape == second.shape and (first != second).all()


def test_the_dealer_learns_public_shapes_alone(models):
    seen = []
    for folder, ids in ((models[0], [5, 6, 7]), (models[1], [90, 80, 70])):
        plan, _, sampling, stop = REQUEST
        *_, (messages, tensors) = run(
            party_jobs.generate, 2, folder, [(plan, ids, sampling, stop)], at_dealer=party_jobs.watch_dealer
        )
        assert tensors == 0
        seen.append(messages)
    # Other weights and another prompt: not one message differs.
    assert seen[0] == seen[1] and len(seen[0]) > 100
    functions = {"additive", "square", "binary", "wraps", "B2A", "stop", "statistics"}
    for message in seen[0]:
        assert message.function in functions
        for argument in message.args:
            assert argument in ("mul", "matmul") or all(isinstance(size, int) for size in argument)
