"""Each mistake on the command line ends in one line that says what to do, before anything has been started."""

import io
import json
import os
import socket
import sys

import pytest
from hf_models import tiny
from programs import GENERATE, Program, error_line

import crypten_llm
from crypten_llm.commands.cli import _parser, main
from crypten_llm.commands.options import prompt
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.launch import LocalParties

IDS = ["--prompt-ids", "5,6,7"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("cli"))[0])


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_parties(monkeypatch):
    """Mistakes are found before a process is started."""

    def refuse(*_):
        raise AssertionError("parties were started")

    monkeypatch.setattr(LocalParties, "_start", refuse)


def fails(capsys, *arguments, code=2) -> str:
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return error_line(captured.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "invalid choice: 'generat'"),
        ([], "COMMAND"),
        (["generate", "--max-new-token", "3"], "unknown option '--max-new-token'; did you mean '--max-new-tokens'?"),
        (["bench", "--kv-length=5"], "unknown option '--kv-length'; did you mean '--kv-len"),
        (["bench", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["generate", "--prompt", "a", "--prompt-ids", "1"], "not allowed with argument"),
        (["generate"], "no prompt; give --prompt TEXT, --prompt-file F or --prompt-ids 1,2,3"),
        (["generate", "--prompt", "  "], "the prompt is empty"),
        (["generate", "--prompt-ids", ","], "the prompt is empty"),
        (["generate", "--prompt-ids", "1,x"], "--prompt-ids takes whole numbers separated by commas"),
        (["generate", "--prompt-file", "/nowhere/at/all"], "cannot read /nowhere/at/all (No such file or directory)"),
        (["generate", "--prompt-ids", "@/nowhere"], "cannot read /nowhere"),
        (["generate", *IDS, "--engine", "criptn"], "unknown engine 'criptn'; did you mean 'crypten'?"),
        (["generate", *IDS, "--policy", "ful"], "unknown policy 'ful'; did you mean 'full'?"),
        (["bench", "--policy", "ful"], "unknown policy 'ful'; did you mean 'full'?"),
        (["generate", *IDS, "--model", "/nowhere/model"], "no such folder"),
        (["generate", *IDS, "--max-new-tokens", "0"], "max_new_tokens is 0; it must be 1 or more"),
        (["generate", *IDS, "--chunk", "0"], "prefill_chunk is 0; it must be 1 or more"),
        (["generate", *IDS, "--temperature", "-1"], "temperature is -1.0"),
        (["generate", *IDS, "--top-p", "2"], "top_p is 2.0"),
        (["generate", *IDS, "--precision-bits", "30"], "precision_bits is 30; it must be 8 to 20"),
        (["generate", *IDS, "--parties", "1"], "1 compute parties cannot keep a secret"),
        (["generate", *IDS, "--timeout", "0"], "timeout is 0.0"),
        (["generate", *IDS, "--timeout", "nan"], "timeout is nan"),
        (["generate", *IDS, "--threads", "-2"], "threads is -2"),
        (["generate", *IDS, "--network", "slow"], "network 'slow' is not known: give lan, wan"),
        (["bench", "--hidden", "10", "--heads", "3", "--kv-heads", "3"], "hidden_size is 10; it must be a multiple"),
        (["bench", "--kv-len", "0"], "kv_len is 0; it must be at least 1"),
        (["bench", "--steps", "0"], "steps is 0; it must be at least 1"),
        (["party", "--engine", "plain"], "engine 'plain' runs in one process"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids", "5,97"], "token id 97 is not in the vocabulary; ids go from 0 to 96"),
        (["--prompt-ids", "-1"], "token id -1 is not in the vocabulary"),
        (["--prompt-ids", ",".join(["5"] * 60)], "the model's context is 64; shorten the prompt by 28 tokens"),
        (["--prompt", "text"], "no tokenizer"),
        (["--prompt-ids", "5", "--tokenizer", "/nowhere"], "no such folder"),
    ],
)
def test_mistakes_that_only_the_model_shows(capsys, model, arguments, message):
    assert message in fails(capsys, "generate", "--engine", "plain", "--model", model, *arguments)


def test_a_prompt_file_that_is_not_text(capsys, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in fails(capsys, "generate", "--prompt-file", tmp_path / "prompt")


@pytest.mark.parametrize(
    ("written", "asked"), [("a b", "a b"), ("a b\n", "a b"), ("a b\r\n", "a b"), ("a\n\n", "a\n"), ("\na ", "\na ")]
)
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_one_newline_at_the_end_of_a_prompt_file_is_not_part_of_it(monkeypatch, tmp_path, written, asked, source):
    path = tmp_path / "prompt.txt"
    path.write_bytes(written.encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO(written, newline=None))
    arguments = _parser().parse_args(["generate", "--prompt-file", str(path) if source == "file" else "-"])
    assert prompt(arguments) == {"prompt": asked}


def test_a_wrong_world_size(capsys, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    message = fails(capsys, "generate", *IDS)
    assert "WORLD_SIZE is 2, but engine 'wire' runs in 3 processes (owner, client, dealer); start 3" in message
    monkeypatch.delenv("MASTER_ADDR")
    assert "MASTER_ADDR not set: start with torchrun" in fails(capsys, "generate", *IDS)


def test_a_port_in_use(capsys, monkeypatch, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        message = fails(capsys, "party", "--model", model, "--timeout", "5")
    assert f"port {port} is in use on this machine" in message and "another MASTER_PORT" in message


def test_plain_inside_torchrun_is_the_clients_alone(capsys, monkeypatch, model):
    for name, value in {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    outputs = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["generate", "--engine", "plain", "--model", model, *IDS, "--max-new-tokens", "1", "--json"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[2] == ""
    assert json.loads(outputs[1])["engine"] == "plain"


def test_json_of_generate(capsys, model):
    command = ["generate", "--engine", "plain", "--model", model, *IDS, "--max-new-tokens", "3", "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    keys = {"text", "token_ids", "prompt_tokens", "engine", "policy", "seconds", "online", "offline", "revealed"}
    assert result.keys() >= keys
    assert result["seconds"].keys() == {"load", "prefill", "per_token"}
    assert result["online"] == {"rounds": 0, "bytes_sent": [0]} and result["offline"]["bytes"] == 0
    with PrivateLlama.from_pretrained(model, engine="plain") as llama:
        assert result["token_ids"] == llama.generate(input_ids=[5, 6, 7], max_new_tokens=3).token_ids
    assert "nothing is private" in captured.err


def test_sampling_options_and_a_file_of_ids(capsys, model, tmp_path):
    (tmp_path / "ids").write_text("5, 6\n7")
    command = ["generate", "--engine", "plain", "--model", model, "--prompt-ids", f"@{tmp_path / 'ids'}", "--json"]
    command += ["--temperature", "0.8", "--top-k", "9", "--top-p", "0.9", "--seed", "4", "--max-new-tokens", "5"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["token_ids"]
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 4}
    with PrivateLlama.from_pretrained(model, engine="plain") as llama:
        assert found == llama.generate(input_ids=[5, 6, 7], max_new_tokens=5, **sampling).token_ids


def test_json_of_bench(capsys):
    sizes = {"hidden": 16, "heads": 2, "kv-heads": 1, "ffn": 24, "layers": 2, "kv-len": 9, "steps": 2}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "--engine", "plain", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.items() >= {name.replace("-", "_"): value for name, value in sizes.items()}.items()
    figures = ("seconds_per_step", "rounds_per_step", "bytes_sent_per_step", "offline_bytes_per_step", "max_abs_err")
    assert result.keys() >= {"engine", "policy", *figures}
    assert result["max_abs_err"] == 0 < result["seconds_per_step"]


def test_a_missing_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "crypten_llm.commands.show", raising=False)
    message = fails(capsys, "generate", *IDS, code=1)
    assert "the package 'tqdm' is not installed; install this project again with its dependencies" in message
    assert "in a clone run 'make install'" in message


def test_verbose_adds_the_traceback(capsys):
    assert main(["generate", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk(model):
    command = [*GENERATE, "--engine", "plain", "--model", model, *IDS, "--json"]
    with open("/dev/full", "w") as full, Program(*command, stdout=full) as program:
        code, _, err = program.finish()
    assert code == 1
    assert error_line(err) == "No space left on device; free the resource it names and run again"
    assert "Exception ignored" not in err


def test_a_reader_that_leaves_is_no_error(model):
    reading, writing = os.pipe()
    os.close(reading)
    command = [*GENERATE, "--engine", "plain", "--model", model, *IDS]
    with os.fdopen(writing, "w") as pipe, Program(*command, stdout=pipe) as program:
        code, _, err = program.finish()
    assert code == 1 and "error" not in err and "Exception" not in err


def test_what_the_encoding_of_stdout_lacks_is_replaced(model):
    """The answer's other characters are shown, whatever the terminal can show."""
    code = "import sys; from crypten_llm.commands.command_line import run; from argparse import Namespace; "
    code += "shown = Namespace(run=lambda _: print('an answer \U0001f642 caf\u00e9')); "
    code += "sys.exit(run(lambda: Namespace(parse_args=lambda _: shown)))"
    with Program("-c", code, fresh=True, PYTHONIOENCODING="cp1252", PYTHONUTF8="0") as program:
        program.process.stdout.reconfigure(encoding="cp1252")
        code, out, err = program.finish()
    assert (code, out, err) == (0, "an answer ? caf\u00e9\n", "")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"crypten-llm {crypten_llm.__version__}\n"
