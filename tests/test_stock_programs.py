"""Keepers, producers with keys of their own, and parties that take from stock: programs under TLS, one is killed."""

import json
import os
import signal
import time
from contextlib import ExitStack

import pytest
from hf_models import tiny
from programs import GENERATE, Program, free_port

from crypten_llm import PrivateLlama
from crypten_llm.links import tls
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.roles import CLIENT, OWNER

ROLES = ("owner", "client", "dealer", "producer 1", "producer 2")
LEVELS = [
    {"prompt_tokens": 8, "max_new_tokens": 4, "blocks": 3},
    {"prompt_tokens": 24, "max_new_tokens": 4, "blocks": 2},
]
PARTY = ["-m", "crypten_llm", "party", "--offline", "--threads", "1", "--timeout", "60"]


def keys_of(folder):
    """A folder of keys for each role, with the certificates of all."""
    for role in ROLES:
        tls.make_key(folder / role, role)
    for role in ROLES:
        for other in set(ROLES) - {role}:
            path = tls.certificate_path(folder / role, other)
            path.write_bytes(tls.certificate_path(folder / other, other).read_bytes())
    return {role: str(folder / role) for role in ROLES}


def until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.05)
    return found


def ids(folder, party):
    return [half.id for half in Stock(folder, party, is_local=True).halves()]


@pytest.mark.slow
def test_two_producers_of_which_one_is_killed(tmp_path):
    model = tiny(tmp_path, num_hidden_layers=1)[0]
    keys, levels = keys_of(tmp_path / "keys"), tmp_path / "levels.json"
    levels.write_text(json.dumps(LEVELS))
    folders, ports = [tmp_path / "o", tmp_path / "c"], [free_port(), free_port()]
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def keep(role, party, *more):
        where = ["--stock", folders[party], "--port", ports[party], "--tls", keys[role], "--timeout", "10"]
        return Program("-m", "crypten_llm", "stock", role, *where, *more)

    def produce(number):
        places = [f"127.0.0.1:{port}" for port in ports]
        own = ["--owner", places[OWNER], "--client", places[CLIENT], "--producer", number, "--timeout", "10"]
        return Program("-m", "crypten_llm", "produce", *own, "--tls", keys[f"producer {number}"])

    def answer(running):
        others = [
            Program(*PARTY, "--model", model, "--tls", keys["owner"], "--stock", folders[OWNER], RANK="0", **place),
            Program(*PARTY, "--tls", keys["dealer"], RANK="2", **place),
        ]
        own = ["--engine", "wire", "--prompt-ids", "5,6,7,8,9", "--max-new-tokens", "3", "--json", "--timeout", "60"]
        more = ["--tls", keys["client"], "--stock", folders[CLIENT]]
        asked = Program(*GENERATE, *own, *more, RANK="1", **place)
        for program in (*others, asked):
            running.enter_context(program)
        found = asked.result()
        assert [other.finish()[0] for other in others] == [0, 0]
        return found

    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        expected = llama.generate(input_ids=[5, 6, 7, 8, 9], max_new_tokens=3).token_ids
    with ExitStack() as running:
        running.enter_context(keep("owner", OWNER)).read_until("producers deliver")
        running.enter_context(keep("client", CLIENT, "--levels", levels)).read_until("producers deliver")
        first = answer(running)  # with which the owner makes its series
        assert (first["token_ids"], first["block"]) == (expected, "")
        killed, other = (running.enter_context(produce(number)) for number in (1, 2))
        killed.read_until("dealing for")
        os.kill(killed.process.pid, signal.SIGKILL)
        until(lambda: len(ids(folders[OWNER], OWNER)) == len(ids(folders[CLIENT], CLIENT)) == 5)
        assert set(ids(folders[OWNER], OWNER)) == set(ids(folders[CLIENT], CLIENT))
        for party, name in ((OWNER, "owner"), (CLIENT, "client")):
            assert not list((folders[party] / name).glob(".*.arriving"))
        stocked = answer(running)
        assert stocked["token_ids"] == expected and stocked["block"]
        until(lambda: len(ids(folders[CLIENT], CLIENT)) == 5, 30)  # what was taken is dealt again
        assert stocked["block"] not in ids(folders[CLIENT], CLIENT)
        again = answer(running)
        assert again["token_ids"] == expected and again["block"] not in ("", stocked["block"])
        os.kill(other.process.pid, signal.SIGTERM)
        assert other.finish(20)[0] == 0
