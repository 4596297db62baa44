"""The meter adds up what it is told, under the names in force, and says where the program is."""

import json
import threading
import time

import pytest

from crypten_llm.links.meter import Meter


def row(meter, phase, kind):
    (found,) = [r for r in meter.table() if (r["phase"], r["kind"]) == (phase, kind)]
    return found


def test_where_names_phase_and_nested_labels():
    meter = Meter()
    assert meter.where == "setup"
    with meter.phase("prefill"):
        assert meter.where == "prefill"
        with meter.operation("layer 3"):
            with meter.operation("softmax", kind="softmax"):
                assert meter.where == "prefill: layer 3 softmax"
            assert meter.where == "prefill: layer 3"
        with meter.phase("decode"):
            assert meter.where == "decode"
    assert meter.where == "setup"


def test_where_is_restored_after_an_error():
    meter = Meter()
    with pytest.raises(KeyError), meter.phase("load"), meter.operation("weights"):
        raise KeyError
    assert meter.where == "setup"


def test_counts_go_to_the_row_in_force():
    meter = Meter()
    with meter.phase("decode"):
        with meter.operation("layer 0", kind="attention"):
            meter.count("online", 1, 2, 30, 40, 0.5)
            with meter.operation("opening"):  # no kind of its own
                meter.count("online", 1, 1, 5, 6, 0.25)
            with meter.operation("exp", kind="softmax"):
                meter.count("dealer", 1, 0, 0, 700, 0.125)
        with meter.operation("layer 1", kind="attention"):
            meter.count("online", 1, 1, 100, 100, 0.0)
    attention, softmax = row(meter, "decode", "attention"), row(meter, "decode", "softmax")
    assert (attention["rounds"], attention["bytes_sent"], attention["bytes_received"]) == (3, 135, 146)
    assert attention["wait_seconds"] == 0.75
    assert (softmax["rounds"], softmax["bytes_received"]) == (0, 0)
    assert (softmax["dealer_rounds"], softmax["dealer_bytes_sent"], softmax["dealer_bytes_received"]) == (1, 0, 700)
    assert [r["kind"] for r in meter.table() if r["phase"] == "decode"] == ["other", "attention", "softmax"]


def test_bytes_of_other_steps_go_to_their_rows():
    """Of one message for several steps rounds, headers and the wait are the waiting step's, and bytes are theirs."""
    meter = Meter()
    with meter.phase("decode"), meter.operation("layer 0", kind="attention"):
        meter.count("online", 1, 1, 130, 60, 0.5, {("decode", "mlp"): (70, 20), ("prefill", "norm"): (36, 16)})
    waiting = row(meter, "decode", "attention")
    assert (waiting["rounds"], waiting["bytes_sent"], waiting["bytes_received"]) == (1, 24, 24)
    assert waiting["wait_seconds"] == 0.5
    for cell, sent, received in ((("decode", "mlp"), 70, 20), (("prefill", "norm"), 36, 16)):
        found = row(meter, *cell)
        assert (found["rounds"], found["bytes_sent"], found["bytes_received"]) == (0, sent, received)
    online = meter.snapshot().online
    assert (online.rounds, online.messages, online.bytes_sent, online.bytes_received) == (1, 1, 130, 60)


def test_a_step_is_come_back_to():
    meter = Meter()
    with meter.phase("prefill"), meter.operation("layer 0", kind="attention"):
        step = meter.scope
    with meter.phase("decode"), meter.operation("layer 1", kind="mlp"):
        with meter.within(step):
            assert (meter.where, meter.cell) == ("prefill: layer 0", ("prefill", "attention"))
            time.sleep(0.02)
        assert meter.where == "decode: layer 1"
    assert row(meter, "prefill", "attention")["seconds"] >= 0.02


def test_programs_side_by_side_are_in_steps_of_their_own():
    meter = Meter()
    with meter.phase("serve"):
        outer = meter.exchange_scopes([meter.scope])
        with meter.operation("first", kind="norm"):
            mine = meter.exchange_scopes(outer)
            assert meter.where == "serve"
            meter.exchange_scopes(mine)
            assert meter.where == "serve: first"
        meter.exchange_scopes(outer)
        with meter.operation("second"):
            assert meter.where == "serve: second"
    assert meter.where == "setup"


def test_totals_subtract_to_the_cost_of_an_interval():
    meter = Meter()
    meter.count("online", 1, 1, 10, 20, 1.0)
    before = meter.snapshot()
    with meter.phase("decode"):
        meter.count("online", 2, 1, 7, 8, 0.5)
        meter.count("dealer", 1, 0, 0, 9, 0.25)
        time.sleep(0.02)
    cost = meter.snapshot() - before
    assert (cost.online.rounds, cost.online.messages) == (2, 1)
    assert (cost.online.bytes_sent, cost.online.bytes_received, cost.online.wait_seconds) == (7, 8, 0.5)
    assert (cost.dealer.rounds, cost.dealer.bytes_received, cost.dealer.wait_seconds) == (1, 9, 0.25)
    assert 0.02 <= cost.seconds < 2
    with pytest.raises(AttributeError):
        cost.seconds = 0


def test_wall_time_excludes_nested_kinds():
    meter = Meter()
    started = time.perf_counter()
    with meter.phase("prefill"), meter.operation("layer", kind="outer"):
        time.sleep(0.03)
        with meter.operation("softmax", kind="inner"):
            time.sleep(0.1)
        time.sleep(0.03)
    elapsed = time.perf_counter() - started
    outer, inner = row(meter, "prefill", "outer")["seconds"], row(meter, "prefill", "inner")["seconds"]
    assert outer >= 0.06 and inner >= 0.1
    assert outer + inner <= elapsed
    assert sum(r["seconds"] for r in meter.table()) <= meter.snapshot().seconds


def test_table_can_be_written_as_json():
    meter = Meter()
    meter.count("dealer", 1, 1, 10, 20, 0.5)
    assert json.loads(json.dumps(meter.table()))[0]["dealer_bytes_sent"] == 10


def test_unknown_channel_is_refused():
    with pytest.raises(AssertionError, match="unknown channel 'onlien'"):
        Meter().count("onlien", 1, 1, 1, 1, 0.0)


def test_counts_from_several_threads_are_not_lost():
    meter = Meter()

    def count():
        for _ in range(20_000):
            meter.count("online", 1, 1, 3, 5, 0.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    online = meter.snapshot().online
    assert (online.rounds, online.bytes_sent, online.bytes_received) == (80_000, 240_000, 400_000)


def test_counting_is_cheap():
    meter = Meter()
    started = time.perf_counter()
    for _ in range(10_000):
        with meter.operation("layer 3 softmax", kind="softmax"):
            meter.count("online", 1, 1, 10, 10, 0.0)
    assert (time.perf_counter() - started) / 10_000 < 50e-6  # about 3 µs on an idle core
