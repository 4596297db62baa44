"""Runs of several processes: started locally, by torchrun and by hand; and every way in which one may end early."""

import json
import os
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hf_models import tiny
from programs import GENERATE, Program, by_hand, error_line, free_port

from crypten_llm.errors import ENDED
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.session.api import PrivateLlama

IDS = "5,6,7,8,9"
CRYPTEN = ["--engine", "crypten"]  # most tests; what they show does not depend on the engine
TORCHRUN = ["-m", "torch.distributed.run"]
KEYS = {"text", "token_ids", "prompt_tokens", "engine", "policy", "seconds", "online", "offline", "revealed"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("launch"), num_hidden_layers=1)[0])


@pytest.fixture(scope="module")
def expected(model):
    with PrivateLlama.from_pretrained(model, engine="plain") as llama:
        return llama.generate(input_ids=[5, 6, 7, 8, 9], max_new_tokens=2).token_ids


@pytest.fixture
def short(model):
    return [*GENERATE, *CRYPTEN, "--model", model, "--prompt-ids", IDS, "--max-new-tokens", "2", "--json"]


@pytest.fixture
def long(model):
    """A run that is still going when something happens to it."""
    asked = ["--prompt-ids", IDS, "--max-new-tokens", "50", "--show-length", "--json"]
    return [*GENERATE, *CRYPTEN, "--model", model, *asked]


def check(result, expected, parties=2, engine="crypten"):
    assert result.keys() >= KEYS
    assert result["token_ids"] == expected
    assert (result["engine"], result["policy"], result["prompt_tokens"]) == (engine, "full", 5)
    assert result["seconds"].keys() >= {"load", "prefill", "per_token"}
    assert result["online"]["rounds"] > 50 and len(result["online"]["bytes_sent"]) == parties
    assert min(result["online"]["bytes_sent"]) > 10_000 and result["offline"]["bytes"] > 10_000
    assert {entry["to"] for entry in result["revealed"]} == {"all", "client"} | (
        {"parties"} if engine == "wire" else set()
    )


@pytest.mark.parametrize(("engine", "parties"), [pytest.param("crypten", 3, marks=pytest.mark.slow), ("wire", 2)])
def test_local_parties(short, expected, engine, parties):
    with Program(*short, "--engine", engine, "--parties", parties, fresh=True) as program:
        program.wait_for(processes=parties + 1)
        for pid, command in program.left().items():
            told = " ".join(command) + Path(f"/proc/{pid}/environ").read_bytes().decode()
            assert (IDS in told) == (pid == program.process.pid), "the prompt is the client's alone"
        check(program.result(90), expected, parties, engine)


def test_torchrun(short, expected):
    launcher = [*TORCHRUN, "--nproc-per-node", "3", "--master-port", free_port()]
    with Program(*launcher, *short, "--engine", "wire", fresh=True) as program:
        check(program.result(90), expected, engine="wire")


def test_torchrun_on_two_nodes(short, expected):
    nodes = [*TORCHRUN, "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    with (
        Program(*nodes, "--node-rank", "0", "--nproc-per-node", "1", *short, fresh=True) as owner,
        Program(*nodes, "--node-rank", "1", "--nproc-per-node", "2", *short, fresh=True) as others,
    ):
        check(others.result(90), expected)
        assert owner.finish()[:2] == (0, "")


def test_by_hand_only_the_owner_knows_where_the_model_is(model, short, expected):
    port = free_port()
    with ExitStack() as running:
        for rank, extra in ((0, ["--model", model]), (2, [])):
            arguments = ["-m", "crypten_llm", "party", *CRYPTEN, *extra, "--threads", "1"]
            running.enter_context(by_hand(3, *arguments, port=port, ranks=[rank])[0])
        blind = [*short, "--model", "/nowhere"]
        client = running.enter_context(by_hand(3, *blind, port=port, ranks=[1])[0])
        check(client.result(), expected)


def test_by_hand_a_client_with_another_models_tokenizer_is_told(model, tmp_path):
    owners = shutil.copytree(model, tmp_path / "owners")
    content = json.loads((SHIPPED / "tokenizer.json").read_text())
    content["model"]["vocab"]["<other>"] = 2048
    (owners / "tokenizer.json").write_text(json.dumps(content))
    port, told = free_port(), []
    with ExitStack() as running:
        for rank, given in ((0, ["--model", owners]), (1, ["--prompt-ids", IDS]), (2, [])):
            (program,) = by_hand(3, *GENERATE, *given, "--timeout", 30, port=port, ranks=[rank])
            told.append(running.enter_context(program))
        owner, client, dealer = (error_line(program.finish()[2]) for program in told)
    assert client.startswith("the tokenizer of 'shipped' is not the owner's model's") and "--tokenizer" in client
    assert owner == dealer == f"rank 1 (client) stopped: {ENDED}"


@pytest.mark.parametrize("asked", [["--prompt-ids", IDS], ["--prompt", "text"]])
def test_by_hand_a_client_whose_owner_has_no_tokenizer(model, expected, asked):
    """Its own --model is 'shipped' by default, whose words these ids do not stand for."""
    port, told = free_port(), []
    with ExitStack() as running:
        for rank, given in ((0, ["--model", model]), (1, [*asked, "--json"]), (2, [])):
            (program,) = by_hand(3, *GENERATE, *given, "--timeout", 30, port=port, ranks=[rank])
            told.append(running.enter_context(program))
        codes, outs, errors = zip(*(program.finish() for program in told), strict=True)
    if asked[0] == "--prompt-ids":
        assert codes == (0, 0, 0) and json.loads(outs[1])["text"] == ""
    else:
        assert codes[1] == 2 and error_line(errors[1]).startswith("the owner's model comes without a tokenizer")


def test_settings_that_differ(model):
    port = free_port()
    with ExitStack() as running:
        programs = []
        for rank, bits in ((0, 16), (1, 14), (2, 16)):
            settings = [*CRYPTEN, "--precision-bits", bits, "--timeout", 20]
            command = [*GENERATE, "--model", model, "--prompt-ids", IDS, *settings]
            programs.append(running.enter_context(by_hand(3, *command, port=port, ranks=[rank])[0]))
        for program in programs:
            code, out, err = program.finish()
            assert code in (2, 3) and out == ""
            assert "disagree on precision_bits: 14 at rank 1 (client), 16 at rank 0 (owner)" in error_line(err)


def test_a_party_that_never_comes(short):
    with ExitStack() as running:
        programs = [running.enter_context(p) for p in by_hand(3, *short, "--timeout", "6", ranks=[0, 1])]
        for program in programs:
            code, _, err = program.finish()
            assert code == 3
            message = error_line(err)  # the owner hosts the store: it may be gone before the client has waited enough
            assert "rank 2 (dealer) did not come within 6 s" in message or "store at 127.0.0.1" in message
            assert program is not programs[0] or "rank 2 (dealer) did not come" in message


def test_what_the_owner_cannot_open_is_said_once(tmp_path):
    folder, _ = tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with Program(*GENERATE, "--model", folder, "--prompt-ids", IDS) as program:
        code, out, err = program.finish()
    assert code != 0 and out == ""
    message = error_line(err)
    assert "only pickle checkpoints" in message and "convert to safetensors" in message
    assert "internal error" not in message


@pytest.mark.parametrize(("rank", "name"), [(0, "owner"), (2, "dealer")])
def test_a_killed_party_ends_the_others(long, rank, name):
    with Program(*long) as program:
        program.read_until("prefill in")
        os.kill(program.pid_of(rank), signal.SIGKILL)
        started = time.monotonic()
        code, out, err = program.finish()
    assert (code, out) == (3, "")
    assert time.monotonic() - started < 8
    assert f"rank {rank} ({name}) was ended by SIGKILL" in error_line(err)


def test_a_party_that_hangs_is_named(long):
    with Program(*long, "--timeout", "5") as program:
        program.read_until("prefill in")
        os.kill(program.pid_of(0), signal.SIGSTOP)
        code, out, err = program.finish()
    assert (code, out) == (3, "")
    message = error_line(err)
    assert "rank 0 (owner) sent nothing for 5 s during decode: " in message
    assert "raise the timeout" in message


def test_ctrl_c_ends_everyone(long):
    with Program(*long) as program:
        program.read_until("prefill in")
        os.killpg(program.process.pid, signal.SIGINT)
        code, out, err = program.finish()
    assert (code, out, error_line(err)) == (130, "", "interrupted")


BETWEEN_TOKENS = """
import os, signal, sys
from crypten_llm.commands import cli, show
say = show.say
def interrupt(text=""):
    say(text)
    if text.startswith("prefill in"):
        os.killpg(0, signal.SIGINT)
show.say = interrupt
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ctrl_c_between_two_tokens_ends_everyone(long):
    with Program("-c", BETWEEN_TOKENS, *long[2:]) as program:
        code, out, err = program.finish()
    assert (code, out, error_line(err)) == (130, "", "interrupted")


def test_ctrl_c_while_parties_start(long):
    with Program(*long, fresh=True) as program:
        program.read_until("engine crypten")
        time.sleep(0.5)
        os.killpg(program.process.pid, signal.SIGINT)
        code, out, err = program.finish()
    assert (code, out, error_line(err)) == (130, "", "interrupted")


@pytest.mark.parametrize("when", ["engine crypten", "prefill in"])
def test_local_parties_end_with_a_client_that_was_killed(long, when):
    with Program(*long, fresh=when == "engine crypten") as program:  # while its parties start
        program.read_until(when)
        program.wait_for(processes=3)
        os.kill(program.process.pid, signal.SIGKILL)
        assert program.finish()[0] == -signal.SIGKILL


def test_by_hand_a_killed_client_ends_the_others(long):
    with ExitStack() as running:
        owner, client, dealer = (running.enter_context(p) for p in by_hand(3, *long))
        client.read_until("prefill in")
        os.kill(client.process.pid, signal.SIGKILL)
        client.finish()
        for program in (owner, dealer):
            code, _, err = program.finish(15)
            assert code == 3
            assert "rank 1 (client) closed the connection" in error_line(err)
