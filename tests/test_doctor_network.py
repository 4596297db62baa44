"""``doctor network``: figures that are the link's own, the same at both ends, a line for what it does not carry."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from programs import by_hand, error_line, free_port

from crypten_llm.commands import doctor_network
from crypten_llm.commands.cli import main
from crypten_llm.commands.doctor_network import Place
from crypten_llm.links import rotation
from crypten_llm.links.network import parse_network
from crypten_llm.links.tls import make_key

ROLES = ["owner", "dealer"]
QUICK = Place(megabytes=2, idle=0.05, timeout=10.0)


def both(places, network=None, roles=ROLES):
    """Whether each end found the link to be ready."""
    port = str(free_port())
    envs = [{"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(doctor_network.run, roles, p, e, network) for p, e in zip(places, envs, strict=True)]
        return [end.result(30) for end in ends]


def test_the_figures_are_those_of_the_link(capsys):
    assert both([QUICK, QUICK], parse_network("20ms,400")) == [True, True]
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok  ", "for cost")) for line in lines)
    found = [line for line in lines if line.startswith("for cost")]
    assert len(found) == 2 and found[0] == found[1]
    trip, width = map(float, re.search(r"--network ([\d.]+)ms,(\d+)", found[0]).groups())
    assert 20 <= trip < 30 and 40 < width < 440
    parse_network(f"{trip}ms,{width}")
    for name in ("connection", "round trip", "owner to dealer", "dealer to owner", "messages", "idle"):
        assert sum(name in line for line in lines) == 2


def test_under_tls_and_with_another_key(capsys, tmp_path):
    made = {role: make_key(tmp_path / role, role) for role in ROLES}
    for mine, theirs in (ROLES, ROLES[::-1]):
        rotation.pin(tmp_path / mine, theirs, made[theirs].certificate, made[theirs].fingerprint)
    places = [Place(tls=str(tmp_path / role), megabytes=2, idle=0, timeout=2.0) for role in ROLES]
    assert both(places) == [True, True] and "TLS 1.3" in capsys.readouterr().out
    other = make_key(tmp_path / "other", "dealer")
    rotation.pin(tmp_path / "owner", "dealer", other.certificate, other.fingerprint)
    assert both(places) == [False, False]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("NO  connection") for line in lines)


def test_a_link_that_is_cut_while_it_is_idle(capsys, monkeypatch):
    from crypten_llm.links.transport import Transport

    exchange, made = Transport.exchange, []

    def cut(self, peer, tensor, channel="online"):
        made.append(self)
        if len(made) > 2 * (2 + len(doctor_network.FRAMES)):
            self.close()
        return exchange(self, peer, tensor, channel)

    monkeypatch.setattr(Transport, "exchange", cut)
    assert both([QUICK, QUICK]) == [False, False]
    lines = capsys.readouterr().out.splitlines()
    assert [sum(line.startswith(mark) for line in lines) for mark in ("NO  idle", "ok")] == [2, 10]


def test_the_command(capsys):
    words = ["-m", "crypten_llm", "doctor", "network", *ROLES, "--idle", "0", "--megabytes", "1"]
    ends = by_hand(2, *words)
    with ends[0], ends[1]:
        for end in ends:
            code, out, err = end.finish()
            assert code == 0 and out.count("ok  ") == 6, err
    (alone,) = by_hand(2, *words, "--timeout", "0.5", ranks=[0])
    with alone:
        code, out, err = alone.finish()
        assert code == 1 and out.startswith("NO  connection") and "the link is not ready" in error_line(err)


@pytest.mark.parametrize(
    "words, says",
    [
        (["cable"], "does not know 'cable'"),
        (["network", "owner"], "takes two roles"),
        (["network", "owner", "king"], "no role 'king'"),
        (["network", "owner", "client"], "not set"),
        (["network", "owner", "client", "--idle", "-1"], "--idle -1"),
    ],
)
def test_what_cannot_be_tried(capsys, words, says):
    assert main(["doctor", *words]) == 2 and says in capsys.readouterr().err
