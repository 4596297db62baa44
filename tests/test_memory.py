"""What a process may still take, and work that is refused because it would not fit."""

import resource

import pytest

from crypten_llm import memory
from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session import sizes
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan

SMALL = LlamaConfig.from_sizes(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, vocab=97, context=4096)


@pytest.mark.parametrize(
    ("system", "group", "process", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 8 kB\n", "max", resource.RLIM_INFINITY, 8192),
        ("MemAvailable: 8 kB\n", "4096\n", resource.RLIM_INFINITY, 4096),
        ("MemAvailable: 8 kB\n", None, 1000, 1000),
    ],
)
def test_the_least_of_what_system_container_and_process_allow(tmp_path, monkeypatch, system, group, process, expected):
    (tmp_path / "meminfo").write_text(system)
    if group is not None:
        (tmp_path / "max").write_text(group)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", (str(tmp_path / "max"), str(tmp_path / "absent")))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (process, process))
    assert memory.available() == expected


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert memory.available() > 1 << 20


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    memory.check(1_000_000, "this")
    with pytest.raises(UsageError, match="^this needs 1.5 MB of memory and this machine has 1.0 MB left; ask for less"):
        memory.check(1_500_000, "this")


def test_predictions_count_from_below():
    """Caches of prompts, and the scores of a pass; a policy that cuts prompts keeps no more than it says."""
    row = 2 * 2 * 8 * 8
    cache, scores = 3 * 100 * row, 4 * 50 * 50 * 8
    assert sizes.of_requests(SMALL, [Plan(100, 1, chunk=50)], 8) == cache + scores
    assert sizes.of_requests(SMALL, [Plan(60, 1, chunk=50, public_prefix=(1,) * 40)] * 2, 8) == (2 * (cache + scores))
    assert sizes.of_token(SMALL, 8) == 3 * row
    assert sizes.of_requests(SMALL, [Plan(100, 1, chunk=50, policy="locret(budget=9)")], 8) == scores
    assert sizes.of_requests(SMALL, [Plan(100, 1)], 0) == 0
    shape = Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, kv_len=10, vocab=97)
    assert sizes.of_bench(shape, 8) == 8 * (shape.config().parameters + 3 * 10 * 2 * 2 * 8)


def test_a_window_bounds_a_cache():
    config = LlamaConfig.from_dict(
        {"model_type": "mistral", "sliding_window": 16, "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    assert sizes.of_requests(config, [Plan(100, 1, chunk=1)], 8) == 3 * 16 * 2 * 2 * 8 * 8 + 4 * 8
