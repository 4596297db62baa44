"""A setting is one field: its option and what local parties are told follow from it."""

import ast
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from crypten_llm.commands import cli
from crypten_llm.commands.options import settings
from crypten_llm.errors import UsageError
from crypten_llm.session.launch import LocalParties
from crypten_llm.session.settings import Child, LaunchConfig, ProtocolConfig, split

CHANGED = {
    **{"engine": "crypten", "compute_parties": 4, "precision_bits": 12, "tape": "tapes", "timeout": 7.5, "threads": 3},
    **{
        "network": "20ms,100",
        "host": "10.0.0.1",
        "link_port": 29501,
        "tls": "keys",
        "offline": True,
        "verbose": True,
        "progress": True,
        "shielded": True,
        "force": True,
        "peer_memory": True,
        "insecure_links": True,
        "calibration_text": "asked.txt",
        "reveal": "top-7",
        "precision": "quantised",
        "policy_weights": "gates.safetensors",
        "session_tokens": 100,
        "day_tokens": 1000,
        "device": "cuda",
        "helper": True,
        "helper_at": "10.0.0.1:29501",
        "owner_at": "10.0.0.2:29500",
        "stock": "stock",
    },
}
"""Another value than the default for each setting."""
ALONE = {
    **{"tape": "wire", "precision": "wire", "peer_memory": "wire", "device": "plain", "stock": "wire"},
    **{"helper": "wire", "helper_at": "wire", "owner_at": "wire"},
}
"""Settings that one engine alone has."""
BOTH = ("helper_at", "owner_at")
"""Of a thin client, which is told both."""


def test_each_setting_is_covered_here():
    assert CHANGED.keys() == {setting.name for kind in (ProtocolConfig, LaunchConfig) for setting in fields(kind)}
    without = [
        setting.name for kind in (ProtocolConfig, LaunchConfig) for setting in fields(kind) if not setting.metadata
    ]
    assert without == ["helper", "progress", "shielded", *BOTH], (
        "bars follow the terminal, chat has Ctrl-C, a helper its command, a thin client two; all others have an option"
    )


@pytest.mark.parametrize("name", sorted(CHANGED.keys() - {"helper", "progress", "shielded", *BOTH}))
@pytest.mark.parametrize("command", ["generate", "bench", "party"])
def test_an_option_sets_its_setting_alone(command, name):
    value = CHANGED[name]
    option = {"compute_parties": "--parties"}.get(name, f"--{name.replace('_', '-')}")
    named = {"compute_parties": "crypten", "precision_bits": "crypten", "device": "plain"}.get(name, "")
    engine = ["--engine", named] if named else []
    words = [option] if value is True else [option, str(value)]
    given = settings(cli._parser().parse_args([command, *engine, *words]))
    expected = {**({"engine": named} if named else {}), name: value, "progress": given["progress"]}
    assert split(given) == split(expected)


def test_a_child_is_told_every_setting():
    for name, value in CHANGED.items():
        base = {"engine": ALONE.get(name, "crypten")} | {both: CHANGED[both] for both in BOTH if name in BOTH}
        protocol, launch = split(base | {name: value})
        told = Child(protocol, launch, "/models/ünï \udcff")
        assert Child.from_json(told.to_json()) == told
        assert name in told.to_json()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_thin_client_is_told_both_places(command):
    words = [command, "--helper", CHANGED["helper_at"], "--owner", CHANGED["owner_at"]]
    protocol, launch = split(settings(cli._parser().parse_args(words)))
    assert protocol.helper and launch.is_thin and [getattr(launch, name) for name in BOTH] == [words[2], words[4]]
    for cut in (words[:3], [command, *words[3:]], [command, "--helper", "local", *words[3:]]):
        with pytest.raises(UsageError, match="both --helper HOST:PORT and --owner HOST:PORT, or --helper local alone"):
            split(settings(cli._parser().parse_args(cut)))
    with pytest.raises(UsageError, match="engine 'plain' has no helper"):
        split(settings(cli._parser().parse_args([*words, "--engine", "plain"])))


@pytest.fixture
def started(monkeypatch):
    """Arguments of the parties that would have been started, by rank."""
    commands = {}

    class Process:
        stderr = ()

        def __init__(self, arguments, environment):
            commands[int(environment["RANK"])] = arguments
            self.stdin = nothing

    monkeypatch.setattr("crypten_llm.session.launch.start_party", Process)
    with open(os.devnull, "w") as nothing:
        yield commands


def test_local_parties_are_started_with_the_clients_settings(started):
    protocol, launch = split({name: value for name, value in CHANGED.items() if name not in ALONE})
    LocalParties(protocol, launch, "/models/secret").listener.close()
    assert started.keys() == {0, 2, 3, 4}
    for rank, command in started.items():
        assert command[:-1] == ["party", "--child"]
        told = Child.from_json(command[-1])
        assert told.protocol == protocol
        text = "asked.txt" if rank == 0 else ""
        expected = replace(launch, host="", link_port=0, progress=False, calibration_text=text)
        assert told.launch == expected, "of the client alone, and of the owner"
        assert told.model == ("/models/secret" if rank == 0 else "")
        assert ("secret" in command[-1]) == (rank == 0)


def test_local_parties_know_who_shares_their_card(started):
    """As the client does; one that others have started knows of itself alone, unless it is told."""

    def told(device):
        started.clear()
        launch = split({"device": device})[1]
        LocalParties(*split({"device": device})).listener.close()
        known = {rank: Child.from_json(command[-1]).launch for rank, command in started.items()}
        assert all(each.device_of(rank) == launch.device_of(rank) for rank, each in known.items())
        beside = {rank: each.beside(rank, 3, False) for rank, each in known.items()}
        return beside | {1: launch.beside(1, 3, True)}

    assert told("cuda:1,cpu,cuda") == {0: (0,), 1: (1,), 2: (2,)}
    assert told("cuda:0,cpu,cuda") == {0: (0, 2), 1: (1,), 2: (0, 2)}
    assert told("cuda") == {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2)}
    assert LaunchConfig("cuda").beside(1, 3, False) == ()


def test_no_command_imports_torch_before_its_arguments_are_read():
    code = "import sys; from crypten_llm.commands import cli; cli._parser(); print(sorted({'torch', 'numpy', 'tqdm'} & "
    found = subprocess.run([sys.executable, "-c", code + "sys.modules.keys()))"], capture_output=True, text=True)
    assert ast.literal_eval(found.stdout) == []
