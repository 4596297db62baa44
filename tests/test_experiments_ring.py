"""The ring kernels' measurement: complete rows, right products, and a file that can be read again."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from experiments.measure import cuda_kernels, ring_kernels


def test_a_short_run(monkeypatch, capsys, tmp_path):
    quick = {"vectors": (16,), "matrices": (8,), "repeats": 2, "seconds": 1e-4, "progress": False}
    run = ring_kernels.run
    monkeypatch.setattr(ring_kernels, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(ring_kernels, "run", lambda **_: run(**quick))
    monkeypatch.setattr(sys, "argv", ["ring_kernels", "--json", str(tmp_path / "out" / "ring.json")])
    ring_kernels.main()
    result = json.loads((tmp_path / "out" / "ring.json").read_text("utf-8"))
    cells = {(row["product"], row["rows"], row["size"], row["x"], row["w"]) for row in result["rows"]}
    sizes = (1, 16), (8, 8)
    assert cells == {(p, *size, *kind) for p in ("nt", "nn") for size in sizes for kind in ring_kernels.KINDS}
    for row in result["rows"]:
        assert all(row[name] > 0 for name in ("microseconds", "ratio"))
        sides = [(4 if row[side] == "int32" else 8) * row["size"] for side in ("x", "w")]
        moved = row["rows"] * (sides[0] + 8 * row["size"]) + row["size"] * sides[1]
        assert row["gb_per_s"] == pytest.approx(moved / row["microseconds"] / 1e3, rel=0.1, abs=0.02)
    assert "torch_gmac_per_s" in capsys.readouterr().out


def test_a_wrong_product_is_not_timed(monkeypatch):
    monkeypatch.setitem(ring_kernels.PRODUCTS, "nn", (lambda x, w: torch.zeros_like(x), False))
    with pytest.raises(AssertionError, match="nn of 1 x 4 by 4 x 4 differs from torch's"):
        ring_kernels.measure("nn", 1, 4, ring_kernels.KINDS[0], 1e9, 1, 1e-4)


def test_kernels_of_a_gpu_are_measured_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cuda_kernels"])
    with pytest.raises(SystemExit, match="2"):
        cuda_kernels.main()
    assert "torch sees no GPU here; run this on a machine that has one" in capsys.readouterr().err
