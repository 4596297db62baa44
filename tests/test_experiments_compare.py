"""The comparison of engines: pairs and ratios, runs that go on where they stopped, and a real run from a tape."""

from __future__ import annotations

import json
import sys

import pytest

from crypten_llm.session.bench import Shape
from experiments.measure import compare_engines
from experiments.measure.compare_engines import SHAPES, key, measure, summary
from experiments.tools import provenance

TINY = Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=1, kv_len=20, steps=2)
CELL = {"rounds": 7, "dealer_rounds": 0, "bytes_sent": 5000, "dealer_bytes": 9, "peak_bytes": 1, "max_abs_err": 0.0123}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command with engines that take 3, 1.5 and 1 s; returns what was measured, the file and the output."""
    measured = []
    seconds = {"crypten": 3.0, "wire": 1.5, "wire, tape": 1.0}

    def fake(shape, engine, timeout, device):
        measured.append((shape.hidden, engine))
        return {"seconds": seconds[engine] / (1 if device == "cpu" else 10), **CELL}

    monkeypatch.setattr(compare_engines, "measure", fake)
    path = tmp_path / "runs" / "compare.json"

    def call(*arguments):
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["compare_engines", "--json", str(path), *arguments])
        compare_engines.main()
        return list(measured), json.loads(path.read_text("utf-8")), path.with_suffix(".md").read_text("utf-8")

    return call


def test_engines_take_turns_and_a_run_goes_on_where_it_stopped(command, capsys):
    measured, result, table = command("--shapes", "small", "--repeats", "2")
    assert measured == [(256, engine) for _ in range(2) for engine in ("crypten", "wire", "wire, tape")]
    assert [row["times_faster"] for row in result["summary"]] == [1.0, 2.0, 3.0]
    assert table == capsys.readouterr().out and table.count("\n") == 5
    assert "| d=256 ffn=688 heads=8 T=1024 layers=1 | wire | 1.5 | 2.0 | 2 | 7 | 0 | 5.0 KB |" in table
    measured, result, _ = command("--repeats", "2", "--engines", "wire")
    assert measured == [(4096, "wire")] * 2 + [(576, "wire")] * 2 and len(result["cells"]) == 10
    assert [row["times_faster"] for row in result["summary"]] == [1.0, 2.0, 3.0, None, None]
    assert command("--repeats", "2", "--engines", "wire")[0] == []


def test_quick_is_one_pair_of_the_small_shape(command):
    measured, result, _ = command("--quick")
    assert [hidden for hidden, _ in measured] == [256] * 3
    assert all("/2 steps/" in name for name in result["cells"])


def test_a_whole_token_is_a_shape_of_its_own(command):
    """Its ratio is that of the published model's sizes, vocabulary and all."""
    shape = SHAPES["SmolLM2"]
    measured, result, table = command("--shapes", "SmolLM2", "--engines", "crypten", "wire, tape")
    assert measured == [(576, "crypten"), (576, "wire, tape")]
    assert [row["times_faster"] for row in result["summary"]] == [1.0, 3.0]
    assert "| d=576 ffn=1536 heads=9 T=256 layers=30 vocab=49152 | wire, tape | 1.0 | 3.0 |" in table
    layer = Shape(**vars(shape) | {"vocab": 0})
    assert key(shape, "wire", 0).replace(" vocab=49152", "") == key(layer, "wire", 0)


def test_a_device_is_a_row_of_its_own(command, monkeypatch):
    monkeypatch.setattr(provenance, "card", lambda: "A Card")
    words = "--shapes", "7B", "--engines", "crypten", "wire"
    _, _, table = command(*words)
    assert "| d=4096 ffn=11008 heads=32 T=512 layers=1 | wire | 1.5 | 2.0 |" in table
    measured, result, table = command(*words, "--device", "cuda")
    assert len(measured) == 2 and len(result["cells"]) == 4 and result["made_by"][-1]["card"] == "A Card"
    assert "| d=4096 ffn=11008 heads=32 T=512 layers=1 on cuda | wire | 0.15 | 2.0 |" in table


def test_repeats_are_paired():
    seconds = {"crypten": (2.0, 8.0, 6.0), "wire": (1.0, 2.0, 2.0)}
    cells = {key(TINY, e, i): {"seconds": s, **CELL} for e, times in seconds.items() for i, s in enumerate(times)}
    assert summary([TINY, SHAPES["7B"]], cells)[1]["times_faster"] == 3.0


def test_a_tape_is_dealt_for_the_run():
    found = measure(TINY, "wire, tape", timeout=60.0)
    assert 0 < found["seconds"] < 5 and found["rounds"] >= 20 and found["dealer_bytes"] > 0
    assert 0 <= found["max_abs_err"] < 0.01
