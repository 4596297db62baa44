"""``chat`` at the terminal: turns, commands and keys, and the summary at the end."""

import io
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack

import pytest
from hf_models import tiny, with_template
from programs import Program, by_hand, free_port

from crypten_llm import PrivateLlama
from crypten_llm.commands import chat as chat_command
from crypten_llm.commands.cli import main
from crypten_llm.session.launch import LocalParties

TEXTS = ["The passkey is 4711.", "What is it?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("command"))


def chat(monkeypatch, model, lines, *options, engine="plain"):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    command = ["chat", "--engine", engine, "--model", str(model), "--max-new-tokens", "3", "--threads", "1"]
    return main([*command, *options])


def answers(model, *turns, **arguments):
    """What the API says to the same turns."""
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        talk = llama.chat(max_new_tokens=3, **arguments)
        return [talk.send(text).text for text in turns]


def test_turns_and_the_summary(model, monkeypatch, capsys):
    assert chat(monkeypatch, model, [TEXTS[0], "", *TEXTS[1:]], "--system", "Be brief.") == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in answers(model, *TEXTS, system="Be brief."))
    lines = captured.err.splitlines()
    assert chat_command.COMMANDS in lines
    assert any(line.startswith("decoding: greedy, at most 3 tokens, until token 2, 1 (") for line in lines)
    turns = lines.index(next(line for line in lines if line.startswith("turn ")))
    first, second = (line.split() for line in lines[turns + 1 : turns + 3])
    assert first[:2] == ["1", "0"] and second[0] == "2" and int(second[1]) > 0
    assert int(second[1]) >= int(first[2])
    (logits,) = [line for line in lines if "logits of each generated token" in line]
    assert logits.split()[-1] == str(int(first[3]) + int(second[3]))


def test_private_turns(model, monkeypatch, capsys):
    assert chat(monkeypatch, model, TEXTS, "--max-new-tokens", "1", engine="wire") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "that the cache holds" in captured.err and "MB" in captured.err


def test_commands(model, monkeypatch, capsys):
    lines = [
        TEXTS[0],
        "/reset",
        TEXTS[0],
        "/system Be brief.",
        TEXTS[0],
        "/system",
        "/help",
        "//x",
        "/quit",
        "never said",
    ]
    assert chat(monkeypatch, model, lines) == 0
    captured = capsys.readouterr()
    first, brief, slash = (
        answers(model, *turns, **system)
        for turns, system in ((TEXTS[:1], {}), (TEXTS[:1], {"system": "Be brief."}), (["/x"], {}))
    )
    assert captured.out == "".join(f"{text}\n" for text in [*first, *first, *brief, *slash])
    said = captured.err.splitlines()
    for line in (
        "a new conversation",
        "a new conversation, after: Be brief.",
        "a new conversation, without a system message",
    ):
        assert line in said
    assert said.count(chat_command.COMMANDS) == 2


def test_a_turn_that_cannot_be_run_does_not_end_the_chat(model, monkeypatch, capsys):
    assert chat(monkeypatch, model, ["word " * 500, TEXTS[0]]) == 0
    captured = capsys.readouterr()
    assert captured.out == answers(model, TEXTS[0])[0] + "\n"
    assert sum(line.startswith("error: the prompt has ") for line in captured.err.splitlines()) == 1


def test_a_cache_that_begins_anew_is_told(tmp_path, monkeypatch, capsys):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    assert chat(monkeypatch, with_template(tmp_path, template), TEXTS) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "the cache begins anew" in line]
    assert told.startswith("the chat template writes the turns so far otherwise than the cache has them, from token ")


@pytest.fixture
def no_parties(monkeypatch):
    def refuse(*_):
        raise AssertionError("parties were started")

    monkeypatch.setattr(LocalParties, "_start", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "h2o"], "policy h2o cannot go on with the cache of an earlier turn"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--stop", ""], "stop is ''"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--tape", "/nowhere"], "a tape is dealt for a prompt of known length, and a chat has turns of any"),
        (["--prompt", "a"], "unknown option '--prompt'"),
    ],
)
def test_mistakes_come_before_any_process(model, monkeypatch, capsys, no_parties, options, message):
    assert chat(monkeypatch, model, [], *options, engine="wire") == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_chat_template_says_so(tmp_path, monkeypatch, capsys):
    assert chat(monkeypatch, "shipped", [TEXTS[0]]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the tokenizer has no chat template" in error
    assert chat(monkeypatch, tiny(tmp_path, num_hidden_layers=1)[0], [TEXTS[0]]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with chat_command._interrupts() as pressed:
        assert not pressed
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def interrupt(program):
    """Sends all processes of the terminal Ctrl-C, after the first letter of an answer."""
    assert program.process.stdout.read(1)
    os.killpg(program.process.pid, signal.SIGINT)
    program.read_until("(the answer ends at its next token; Ctrl-C again ends the chat)")


COMMAND = ["-m", "crypten_llm", "chat", "--offline", "--threads", "1", "--network", "10ms,1000", "--timeout", "60"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(model):
    with Program(*COMMAND, "--model", model, "--max-new-tokens", "40", "--eos-token-id", "2047") as program:
        program.process.stdin.write(TEXTS[0] + "\n")
        program.process.stdin.flush()
        program.read_until("// sends a text")
        interrupt(program)
        program.process.stdin.write(TEXTS[1] + "\n/quit\n")
        program.process.stdin.flush()
        code, out, err = program.finish(120)
    assert code == 0
    assert err.count("number of generated tokens") == 2
    first, second = (line.split() for line in err.partition("turn ")[2].splitlines()[1:3])
    assert (first[0], second[0]) == ("1", "2") and int(first[3]) < 40 and int(second[1]) > 0


def test_in_three_shells_the_client_talks(model, tmp_path):
    """Each started by hand; the client has the tokenizer's folder alone, and only the owner's shell the model."""
    folder = tmp_path / "public"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    port = free_port()
    with ExitStack() as running:
        for rank, extra in ((0, ["--model", model]), (2, [])):
            arguments = ["-m", "crypten_llm", "party", *extra, "--threads", "1"]
            running.enter_context(by_hand(3, *arguments, port=port, ranks=[rank])[0])
        command = ["-m", "crypten_llm", "chat", "--tokenizer", folder, "--threads", "1", "--max-new-tokens", "1"]
        client = running.enter_context(by_hand(3, *command, port=port, ranks=[1])[0])
        client.process.stdin.write("\n".join(TEXTS) + "\n")
        client.process.stdin.flush()
        code, out, err = client.finish()
    assert code == 0 and len(out.splitlines()) == 2
    assert "until token 2, 1 (generation_config.json and the tokenizer)" in err
    assert "that the cache holds" in err


def test_ctrl_c_a_second_time_ends_the_chat(model):
    with Program(*COMMAND, "--model", model, "--max-new-tokens", "200", "--eos-token-id", "2047") as program:
        program.process.stdin.write(TEXTS[0] + "\n")
        program.process.stdin.flush()
        program.read_until("// sends a text")
        interrupt(program)
        os.killpg(program.process.pid, signal.SIGINT)
        code, _, err = program.finish()
    assert code == 130 and err.splitlines()[-1].startswith("error: ")
