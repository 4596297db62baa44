"""A stock: halves that are used once whatever happens, and how they come: both of a block, or none."""

import os
import shutil
import signal
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
from stocks import LEVELS, SERIES, dealt, keepers, lines, put, take
from tapes import open_tape
from transports import socket_pair

from crypten_llm.commands import produce, stock
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import tls
from crypten_llm.links.waiting import Wait
from crypten_llm.protocols.dealer.layout import path_in
from crypten_llm.protocols.dealer.manifest import PARTIES
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import series
from crypten_llm.session.delivery import PARTY, PRODUCER, Refused
from crypten_llm.session.plan import Plan
from crypten_llm.session.stocked import fitted, is_worth_it

SHORT = LEVELS[0].plan()


@pytest.fixture
def stocks(tmp_path):
    return [Stock(tmp_path / "stock", party, is_local=True) for party in PARTIES]


def files(stock):
    return sorted(path.name for path in stock.folder.iterdir() if path.name not in ("used", ".keeper"))


# Used once.


def test_a_half_is_taken_once_and_leaves_nothing(stocks, tmp_path):
    first, second = (put(stocks, tmp_path / str(number)) for number in range(2))
    owner, client = stocks
    assert [half.id for half in client.halves()] == [first, second], "oldest first"
    half = client.halves()[0]
    before = (client.folder / f"{first}.block").read_bytes()
    tape = take(client, half)
    assert tape.keys[0] in before and files(client) == [f"{second}.block"]
    for other in (client, Stock(tmp_path / "stock", CLIENT, is_local=True)):  # another process knows it as well
        assert [half.id for half in other.halves()] == [second] and other.has_used(first)
        with pytest.raises(UsageError, match="no tape at|not the block"):
            take(other, half)
        with pytest.raises(UsageError, match="was delivered here before"):
            other.arriving(first)
    (client.folder / f"{first}.block").write_bytes(before)  # put back all the same
    assert [half.id for half in client.halves()] == [second]
    with pytest.raises(UsageError, match="nothing was used"):
        take(client, half)
    tape.begin("one")
    assert tape.read(13 * 8 + 31).numel() == 135, "the material is there for this process alone"
    assert len(owner.halves()) == 2, "the other half is the other party's"


def test_a_crash_after_it_was_taken(stocks, tmp_path):
    name = put(stocks, tmp_path / "out")
    child = os.fork()
    if child == 0:
        take(stocks[OWNER], stocks[OWNER].halves()[0])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert stocks[OWNER].halves() == [] and stocks[OWNER].has_used(name)


def test_burned_before_it_is_given_out(stocks, tmp_path, monkeypatch):
    put(stocks, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UsageError, match="cannot use"):
        take(stocks[OWNER], stocks[OWNER].halves()[0])


def test_a_tape_is_no_block_nor_the_other_way_round(stocks, tmp_path):
    dealt(tmp_path / "out")
    with pytest.raises(UsageError, match="is a block of a stock"):
        open_tape(tmp_path / "out", OWNER)


def test_the_other_partys_folder_is_refused(stocks, tmp_path):
    with pytest.raises(UsageError, match="stock/client is the client's stock and must not be on the owner's host"):
        Stock(tmp_path / "stock", OWNER)
    os.chmod(stocks[OWNER].folder, 0o755)
    with pytest.raises(UsageError, match="others than you can read"):
        Stock(tmp_path / "stock", OWNER, is_local=True)


# What a block serves.


@pytest.mark.parametrize(
    "asked, pads",
    [
        (Plan(8, 4), 0),
        (Plan(5, 3, hide_length=True), 3),
        (Plan(8, 1), 0),
        (Plan(9, 4), None),
        (Plan(8, 5), None),
        (Plan(8, 4, chunk=4), None),
        (Plan(8, 4, policy="snapkv"), None),
        (Plan(8, 4, public_prefix=(1,)), None),
        (Plan(8, 4, reveal="top-3"), None),
    ],
)
def test_which_requests_a_block_serves(asked, pads):
    facts = {name: value for name, value in SHORT.facts().items() if name not in ("pads", "hide_length")}
    made = fitted(facts, asked)
    assert made == (None if pads is None else replace(asked, pads=pads, padded=12))
    if made and made.max_new_tokens > 1:
        assert made.room() == SHORT.room() == 12


def test_pads_are_worth_it_up_to_the_prompts_length_or_a_chunk():
    plans = [
        Plan(prompt, 4, 128, pads=pads, padded=400) for prompt, pads in ((5, 123), (5, 124), (100, 100), (100, 101))
    ]
    assert [is_worth_it(plan) for plan in plans] == [True, False, True, False]


def test_without_a_padded_cache_lengths_are_those_that_were_dealt():
    facts = {name: value for name, value in replace(SHORT, padded=0).facts().items() if name != "hide_length"}
    assert fitted(facts, Plan(8, 3)) == Plan(8, 3) and fitted(facts, Plan(7, 3)) is None


def test_a_series_is_of_what_decides_which_words_are_hidden(tmp_path):
    given = b"w" * 32, {"hidden_size": 8}, "logits", "default", {"torch": "2"}
    first = series.of_weights(tmp_path, *given)
    assert series.of_weights(tmp_path, *given) == first == series.read(tmp_path)
    assert (tmp_path / series.FILE).stat().st_mode & 0o777 == 0o600
    for place, other in enumerate([b"v" * 32, {"hidden_size": 9}, "tokens", "quantised", {"torch": "3"}]):
        changed = [other if at == place else value for at, value in enumerate(given)]
        assert series.of_weights(tmp_path, *changed).key != first.key
    assert series.of_weights(tmp_path, *given).key != first.key, "a key that hid other words is not taken up again"


# How they come.


def deliver(lines, out, manifest, settles=True):
    for line in lines:
        line.reserve(manifest.id, path_in(out, line.party).stat().st_size)
    for line in lines:
        line.deliver(path_in(out, line.party))
    for line in lines if settles else ():
        line.settle()


def test_two_producers_fill_the_emptiest_shape_first(tmp_path):
    both = keepers(tmp_path / "stock")
    with lines(*both) as one, lines(*both) as two:
        orders = [line.order(SERIES) for line in (one[CLIENT], two[CLIENT])]
        assert [order.plan for order in orders] == [LEVELS[0].plan(), LEVELS[1].plan()]
        assert orders[0].missing == 3 and orders[0].filled == 0
        for number, (mine, order) in enumerate(zip((one, two), orders, strict=True)):
            out = tmp_path / str(number)
            deliver(mine, out, dealt(out, order.plan))
        third = one[CLIENT].order(SERIES)
        assert third.plan == LEVELS[0].plan() and (third.missing, third.filled) == (1, 0.5)
        assert two[CLIENT].order(SERIES).plan is None, "another deals it"
        out = tmp_path / "last"
        deliver(one, out, dealt(out, third.plan))
        assert one[CLIENT].order(SERIES).plan is None and one[OWNER].terms() is None
    ids = [[half.id for half in keeper.stock.halves()] for keeper in both]
    assert ids[0] == ids[1] and len(set(ids[0])) == 3


@pytest.mark.parametrize("when", ["reserved", "within a half", "before the other half", "delivered"])
def test_a_producer_that_dies_leaves_nothing(tmp_path, when):
    both = keepers(tmp_path / "stock")
    manifest = dealt(tmp_path / "out")
    with lines(*both) as mine:
        assert mine[CLIENT].order(SERIES).plan
        for line in mine:
            line.reserve(manifest.id, path_in(tmp_path / "out", line.party).stat().st_size)
        if when == "within a half":
            path = path_in(tmp_path / "out", OWNER)
            os.truncate(path, 100)
            mine[OWNER]._heed = lambda: None
            mine[OWNER].deliver(path)
        for line in {"before the other half": mine[:1], "delivered": mine}.get(when, ()):
            line.deliver(path_in(tmp_path / "out", line.party))
    assert [files(keeper.stock) for keeper in both] == [[], []]
    with lines(both[CLIENT]) as (line,):
        assert line.order(SERIES).plan == LEVELS[0].plan(), "what it was to deal is dealt by others"


def test_what_is_not_taken(tmp_path):
    both = keepers(tmp_path / "stock", most=5000)
    out, manifest = tmp_path / "out", dealt(tmp_path / "out")
    sizes = [path_in(out, party).stat().st_size for party in PARTIES]
    with lines(*both) as mine, lines(*both) as others:
        mine[OWNER].reserve(manifest.id, 4000)
        with pytest.raises(Refused, match="the owner's stock is full: 4,000 bytes of 5,000"):
            others[OWNER].reserve("f" * 16, 2000)
        with pytest.raises(Refused, match="is being delivered by another producer"):
            others[OWNER].reserve(manifest.id, 100)
        with pytest.raises(Refused, match="no half has come whole"):
            mine[OWNER].settle()
        mine[OWNER].reserve(manifest.id, sizes[CLIENT])
        with pytest.raises(Refused, match="no unused half of the owner's"):
            mine[OWNER].deliver(path_in(out, CLIENT))
        whole = path_in(out, OWNER).read_bytes()
        for place in (-1, 60):  # in the material, and in what was signed
            path_in(out, OWNER).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place:][1:])
            mine[OWNER].reserve(manifest.id, sizes[OWNER])
            with pytest.raises(Refused, match="damaged|no half of a block|no unused half"):
                mine[OWNER].deliver(path_in(out, OWNER))
        path_in(out, OWNER).write_bytes(whole)
        deliver(mine, out, manifest)
        with pytest.raises(Refused, match="was delivered here before"):
            mine[OWNER].reserve(manifest.id, sizes[OWNER])
        take(both[OWNER].stock, both[OWNER].stock.halves()[0]).close()
        with pytest.raises(Refused, match="was delivered here before"):
            others[OWNER].reserve(manifest.id, sizes[OWNER])


def test_halves_of_a_key_that_is_not_pinned(tmp_path):
    both = keepers(tmp_path / "stock", signers=["somebody else"])
    manifest = dealt(tmp_path / "out")
    with lines(*both) as mine, pytest.raises(Refused, match="is not signed by the dealer's key"):
        deliver(mine, tmp_path / "out", manifest)
    assert [files(keeper.stock) for keeper in both] == [[], []]


def test_a_producer_out_of_step_is_left(tmp_path):
    (owner, _) = keepers(tmp_path / "stock")
    (tmp_path / "nothing").write_bytes(b"")
    with lines(owner) as (line,), pytest.raises(PartyError):
        line.deliver(tmp_path / "nothing")
    assert owner.producers == 0


def test_one_keeper_of_a_folder(tmp_path):
    first = keepers(tmp_path / "stock")
    (first[0].stock.folder / ".0123456789abcdef.arriving").write_bytes(b"half")
    with pytest.raises(UsageError, match="another process keeps the stock"):
        keepers(tmp_path / "stock")
    for keeper in first:
        os.close(keeper._lock)
    assert files(keepers(tmp_path / "stock")[0].stock) == [], "what was left half-way is gone"


def test_what_of_another_series_is_dropped(tmp_path, monkeypatch):
    owner, client = keepers(tmp_path / "stock")
    old = put([owner.stock, client.stock], tmp_path / "old", series="another series")
    with lines(client) as (line,):
        line.order(SERIES)
        assert [half.id for half in client.stock.halves()] == [old]
        monkeypatch.setattr("crypten_llm.protocols.dealer.stock.GRACE_SECONDS", -1.0)
        line.order(SERIES)
    assert client.stock.halves() == [] and client.stock.has_used(old)


# What the commands are given.


def test_levels_are_a_file_of_the_clients(tmp_path):
    path = tmp_path / "levels.json"
    path.write_text('[{"prompt_tokens": 8, "max_new_tokens": 4, "blocks": 2, "policy": "snapkv"}]')
    (level,) = stock.read_levels(str(path))
    assert level.blocks == 2 and level.plan().padded == 0 and level.plan().policy.startswith("snapkv")
    for text, message in (
        ("[]", "names no shape, or one twice"),
        (path.read_text().replace("}]", "}, ") + path.read_text()[1:], "names no shape, or one twice"),
        ('[{"prompt_tokens": 0, "max_new_tokens": 4, "blocks": 2}]', "prompt_tokens"),
        ('[{"prompt_tokens": 8, "max_new_tokens": 4, "blocks": 2, "policy": "none such"}]', "policy"),
    ):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            stock.read_levels(str(tmp_path / "wrong.json"))
    given = str(tmp_path / "stock"), "127.0.0.1", 0
    for role, levels, gigabytes, message in (
        ("owner", str(path), 1.0, "at the client's stock and there alone"),
        ("client", "", 1.0, "at the client's stock and there alone"),
        ("owner", "", 0.0, "must be above 0"),
        ("dealer", "", 1.0, "a stock is the owner or the client's"),
    ):
        with pytest.raises(UsageError, match=message):
            stock.keep(role, *given, levels, gigabytes)


def test_a_producer_is_told_where_and_who(tmp_path):
    assert produce.place_of("[::1]:29601") == ("::1", 29601) and produce.place_of("host:1") == ("host", 1)
    for wrong in ("host", "host:", ":29601", "host:70000"):
        with pytest.raises(UsageError, match="is no place of a keeper"):
            produce.place_of(wrong)
    with pytest.raises(UsageError, match="--tls takes --producer N"):
        produce.produce("a:1", "b:2", stock.Where(tls=str(tmp_path)))
    with pytest.raises(UsageError, match="has the certificate of no producer"):
        stock.greeter(OWNER, 0, "127.0.0.1", stock.Where(tls=str(tmp_path)))
    with pytest.raises(UsageError, match="would be plain TCP"):
        stock.greeter(OWNER, 0, "192.0.2.1", stock.Where())


def test_each_producer_has_a_key_of_its_own(tmp_path):
    """And one whose certificate is not pinned is turned away, as is the dealer."""
    numbers = (1, 2, 3)
    for role in ("owner", "dealer", *(f"producer {number}" for number in numbers)):
        tls.make_key(tmp_path / role, role)
    for number in numbers:
        there, pinned = tmp_path / f"producer {number}", tls.certificate_path(tmp_path / "owner", f"producer {number}")
        shutil.copy(tmp_path / "owner" / "owner.crt", there)
        if number < 3:
            shutil.copy(tls.certificate_path(there, f"producer {number}"), pinned)
    shutil.copy(tmp_path / "owner" / "owner.crt", tmp_path / "dealer")
    at_owner = stock.greeter(OWNER, PARTY, "127.0.0.1", stock.Where(tls=str(tmp_path / "owner")))
    for own, is_known in (("producer 1", True), ("producer 2", True), ("producer 3", False), ("dealer", False)):
        dialling = stock.greeter(OWNER, PRODUCER, "127.0.0.1", stock.Where(tls=str(tmp_path / own)), own)
        ours, theirs = socket_pair()
        found = []

        def answer(sock=theirs, found=found):
            with suppress(OSError):
                found.append(at_owner.answer(sock, {PRODUCER}, Wait(5.0)))

        thread = threading.Thread(target=answer)
        thread.start()
        with suppress(OSError):
            dialling.dial(ours, PARTY, Wait(5.0)).close()
        thread.join(10)
        assert [rank for rank, _ in found] == ([PRODUCER] if is_known else [])
        for _, sock in found:
            sock.close()


def test_what_half_steps_leave_is_removed_at_the_next_start(stocks, tmp_path):
    name = put(stocks, tmp_path / "out")
    stocks[OWNER]._write_off(name)  # and ended before its key was overwritten
    assert stocks[OWNER].halves() == [] and files(stocks[OWNER]) == [f"{name}.block"]
    assert files(Stock(tmp_path / "stock", OWNER, is_local=True)) == []
