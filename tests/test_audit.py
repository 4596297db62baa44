"""The audit catches each way in which a mask could serve twice, by name, and lets whole runs pass."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import CASES, tiny
from wire_parties import open_wires, run, share

from crypten_llm.commands import cli, debug_compare
from crypten_llm.insecure.audit import MaskReused
from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import Dealer, Party
from crypten_llm.protocols.dealer.runtime import Piece
from crypten_llm.protocols.opening import Opening

VALUES = torch.arange(40).view(4, 10)
UNDRAWN = "is hidden by what was not drawn as a mask, or has hidden something before"


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


def opened_together_behind_a_stored_mask(runtime):
    stored(runtime)
    open_wires(runtime, [Opening(share(runtime, value, bits=8)) for value in (VALUES, VALUES + 1)])


def piece(runtime, mask, count=40, bits=64, modulus=None):
    """An opening of zeros behind ``mask``."""
    shape = (count,) if bits <= 64 else (count, ring.limbs(bits))
    zeros = runtime.share(shape, lambda: torch.zeros(shape, dtype=torch.int64))
    return Piece((count,), bits, runtime.transport.meter.cell, zeros, mask, modulus=modulus)


def behind(make, **options):
    """A job that opens zeros behind what ``make`` makes of a runtime."""
    return lambda runtime: runtime.exchange([piece(runtime, make(runtime), **options)])


def spent(runtime):
    mask = runtime.mask((40,)).held
    runtime.exchange([piece(runtime, mask)])
    return mask


def written_to(runtime):
    mask = runtime.mask((40,)).held
    mask[3:] = 0
    return mask


def of_another_section(runtime):
    mask = runtime.mask((40,)).held
    runtime.begin("the next")
    return mask


def part(start, count):
    return lambda runtime: runtime.mask((40,)).held[start : start + count]


REFUSED = {  # each way to hide an opening that does not, and how it is named
    "a stored mask": (opened_behind_a_stored_mask, UNDRAWN),
    "one mask for two of a message": (opened_together_behind_a_stored_mask, UNDRAWN),
    "no mask": (behind(lambda runtime: torch.zeros(40, dtype=torch.int64)), UNDRAWN),
    "a copy": (behind(lambda runtime: runtime.mask((40,)).held.clone()), UNDRAWN),
    "the same again": (behind(spent), UNDRAWN),
    "a view of it again": (behind(lambda runtime: spent(runtime).view(8, 5).view(40)), UNDRAWN),
    "a part of another": (behind(part(0, 30), count=30), "by 30 words, of a mask of 40 of 'test, setup'"),
    "the end of another": (behind(part(10, 30), count=30), UNDRAWN),
    "fewer words": (behind(lambda runtime: runtime.mask((39,)).held), "by 39 words, of a mask of 39 of"),
    "more words": (behind(lambda runtime: runtime.mask((41,)).held), "by 41 words, of a mask of 41 of"),
    "one word for all": (behind(lambda runtime: runtime.mask((1,)).held.expand(40)), "by 40 words, of a mask of 1 of"),
    "one word for all that follow": (behind(lambda runtime: runtime.mask((1,)).held), "by 1 words, of a mask of 1 of"),
    "some words twice": (
        behind(lambda runtime: runtime.mask((40,)).held.as_strided((20, 2), (1, 1))),
        "by 40 words, of a mask of 40 of",
    ),
    "fewer bits": (behind(lambda runtime: runtime.mask((40,), 36).held, bits=37), r"a mask modulo 2\^36 of"),
    "more bits": (behind(lambda runtime: runtime.mask((40,), 38).held, bits=37), r"a mask modulo 2\^38 of"),
    "fewer limbs": (behind(lambda runtime: runtime.mask((40,)).held, bits=100), "by 40 words, of a mask of 40 of"),
    "fewer bits of limbs": (behind(lambda runtime: runtime.mask((40,), 99).held, bits=100), r"a mask modulo 2\^99 of"),
    "another modulus": (
        behind(lambda runtime: runtime.mask_below((40,), 200).held, bits=8, modulus=208),
        "a mask modulo 200 of",
    ),
    "a power of two for one less": (
        behind(lambda runtime: runtime.mask((40,), 128).held, bits=128, modulus=2**128 - 1),
        r"a mask modulo 2\^128 of",
    ),
    "what was written to": (behind(written_to), "by a mask that was changed since it was drawn in 'test, setup'"),
    "a mask of a section that has ended": (behind(of_another_section), UNDRAWN),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hides_nothing_is_refused(name):
    job, reason = REFUSED[name]
    with pytest.raises(MaskReused, match=f"^an opening of .0 numbers modulo .* in '.*' .*{reason}.*; draw one mask"):
        run(job)


def drawn_early(runtime):
    """Masks of every kind, drawn before and between others' messages, used in another order, one as a view."""
    kinds = [
        (runtime.mask((40,), 8).held, {"bits": 8}),
        (runtime.mask((40,)).held, {}),
        (runtime.mask((40,), 100).held, {"bits": 100}),
        (runtime.mask_ones((40,), 256).held, {"bits": 256, "modulus": 2**256 - 1}),
        (runtime.mask_below((40,), 208).held, {"bits": 8, "modulus": 208}),
        (runtime.mask((0,)).held, {"count": 0}),
        (runtime.mask((8, 5)).held.view(40), {}),
    ]
    open_wires(runtime, [Opening(share(runtime, VALUES, bits=8), truncate=3, lifted=64)])
    for mask, options in reversed(kinds[1:]):
        runtime.exchange([piece(runtime, mask, **options)])
    runtime.exchange([piece(runtime, kinds[0][0], bits=8), piece(runtime, runtime.mask((40,)).held)])
    runtime.end()
    return runtime.audit


def test_a_mask_may_be_drawn_long_before_its_message():
    owner, client, dealer = run(drawn_early).results
    for audit in (owner, client):
        assert audit.messages == 8 and audit.draws == dealer.draws == 9 and not audit.unused and not audit.waiting


def test_masks_that_no_message_used_hide_nothing_later():
    def job(runtime, later=False):
        early = runtime.mask((5,)).held
        open_wires(runtime, [Opening(share(runtime, VALUES))])
        runtime.begin("the next")
        if later:
            runtime.exchange([piece(runtime, early, count=5)])
        return runtime.audit

    assert [(audit.unused, len(audit.waiting)) for audit in run(job).results] == [(1, 0), (1, 0), (0, 0)]
    with pytest.raises(MaskReused, match=UNDRAWN):
        run(job, True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("audit"), **CASES["gqa"])[0]


def test_a_run_whose_cache_grows_passes(model):
    """Two chunks of prefill, then rows that join one by one."""
    found = debug_compare.audit(model, [1, 5, 9, 2, 7], steps=4, chunk=3)
    owner, client, dealer = found.values()
    assert owner["messages"] == client["messages"] > 100 and dealer["messages"] == 0
    assert (owner["streams"], client["streams"], dealer["streams"]) == (5, 4, 9)  # a token's; the owner's weights
    assert all(seen["words"] > 1000 and seen["unused"] == 0 for seen in found.values())


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
