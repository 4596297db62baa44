"""The audit catches each way in which a mask could serve twice, by name, and lets whole runs pass."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import CASES, tiny
from wire_parties import open_wires, run, share

from crypten_llm.commands import cli, debug_compare
from crypten_llm.insecure.audit import MaskReused
from crypten_llm.protocols.dealer.roles import Dealer, Party, Piece
from crypten_llm.protocols.opening import Opening

VALUES = torch.arange(40).view(4, 10)


def stored(runtime):
    """One mask for all openings of a shape, as a careless cache would have it."""
    masks, mask = {}, runtime.mask

    def cached(shape, bits=64):
        if shape not in masks:
            masks[shape] = mask(shape, bits)
        return masks[shape]

    runtime.mask = cached


def opened_behind_a_stored_mask(runtime):
    stored(runtime)
    for value in (VALUES, VALUES + 1):
        open_wires(runtime, [Opening(share(runtime, value, bits=8))])


def without_a_mask(runtime):
    nothing = runtime.share((3,), lambda: torch.zeros(3, dtype=torch.int64))
    runtime.exchange([Piece((3,), 64, runtime.transport.meter.cell, nothing, nothing)])


def fewer_masks_than_words(runtime):
    runtime.mask((2,))
    without_a_mask(runtime)


@pytest.mark.parametrize(
    ("job", "covered"), [(opened_behind_a_stored_mask, 0), (without_a_mask, 0), (fewer_masks_than_words, 16)]
)
def test_a_message_without_fresh_masks(job, covered):
    with pytest.raises(MaskReused, match=f"message of .* bytes in 'test, .*' has {covered} bytes of fresh masks"):
        run(job)


def test_masks_that_no_message_used_hide_nothing_later():
    def job(runtime):
        runtime.mask((5,))
        open_wires(runtime, [Opening(share(runtime, VALUES))])
        without_a_mask(runtime)

    with pytest.raises(MaskReused, match="has 0 bytes"):
        run(job)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("audit"), **CASES["gqa"])[0]


def test_a_run_whose_cache_grows_passes(model):
    """Two chunks of prefill, then rows that join one by one."""
    found = debug_compare.audit(model, [1, 5, 9, 2, 7], steps=4, chunk=3)
    owner, client, dealer = found.values()
    assert owner["messages"] == client["messages"] > 100 and dealer["messages"] == 0
    assert (owner["streams"], client["streams"], dealer["streams"]) == (5, 4, 9)  # a token's; the owner's weights
    assert all(seen["words"] > 1000 for seen in found.values())


def test_a_mask_that_a_whole_run_uses_twice_is_named(model, monkeypatch):
    """From the second decode step on, keys and values of layer 1 get the masks that they had before."""
    kept = {}

    def make_careless(kind, mask):
        def careless(runtime, shape, bits=64):
            where = runtime.transport.meter.where
            if "decode: layer 1 scores" not in where:
                return mask(runtime, shape, bits)
            return kept.setdefault((runtime.role, tuple(shape), bits), mask(runtime, shape, bits))

        monkeypatch.setattr(kind, "mask", careless)

    for kind in (Party, Dealer):
        make_careless(kind, kind.mask)
    place = "request 1 token [12], decode: layer 1 scores"
    with pytest.raises(MaskReused, match=f"a mask in '{place}' is the one that hid a value in '{place}'"):
        debug_compare.audit(model, [1, 5, 9], steps=4)


def test_command(capsys, model):
    arguments = ["debug-compare", "--audit", "--model", str(model), "--prompt-ids", "5,6,7", "--steps", "2", "--json"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["audit"].keys() == {"owner", "client", "dealer"}
    assert err.count("no mask was used twice") == 3
