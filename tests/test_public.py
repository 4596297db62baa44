"""Which part of a prompt is public: texts, ids, the beginning of a chat; in the API and on the command line."""

import json

import pytest
from hf_models import GOES_ON, with_template
from test_chat import SAID, asked_for, clear_texts, restarts
from test_chat_command import chat as chat_command

from crypten_llm import PrivateLlama
from crypten_llm.commands.cli import main
from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import encode_prompt, encode_rendered, render_chat
from crypten_llm.session.public import beginning, cut
from crypten_llm.session.request import Request

PUBLIC, SECRET = "The river Alda flows through the town of Mirow.", " Who is its mayor?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("public"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture(scope="module", params=["wire", "crypten"])
def private(model, request):
    with PrivateLlama.from_pretrained(str(model), engine=request.param, timeout=60, threads=1) as llama:
        yield llama


# Texts.


@pytest.mark.parametrize("secret", [SECRET, "a", "  a", "\n\n", ".", "s", "é", "</s>"])
@pytest.mark.parametrize("public", [PUBLIC, "a", "a ", "The town", "\n", "</s>"])
def test_the_public_ids_do_not_depend_on_what_follows(plain, public, secret):
    first, rest = cut(plain.tokenizer, public, secret, encode_prompt)
    assert first == encode_prompt(plain.tokenizer, public) and rest
    assert plain.tokenizer.decode([*first, *rest]) == plain.tokenizer.decode(
        encode_prompt(plain.tokenizer, public + secret)
    )
    whole = encode_prompt(plain.tokenizer, public + secret)
    assert [*first, *rest] == whole or whole[: len(first)] != first


def test_texts_and_ids_in_any_pair(plain):
    tokens = [encode_prompt(plain.tokenizer, PUBLIC), encode_prompt(plain.tokenizer, PUBLIC + SECRET)]
    rest = tokens[1][len(tokens[0]) :]
    for first in ({"public_prefix": PUBLIC}, {"public_prefix": tokens[0]}):
        for then in ({"prompt": SECRET}, {"input_ids": rest}):
            request = Request(**first, **then)
            assert request.parts(lambda: plain.tokenizer) == (tokens[0], rest)
            assert request.ids(lambda: plain.tokenizer) == tokens[1]
    found = plain.generate(SECRET, public_prefix=PUBLIC, max_new_tokens=3)
    assert found.token_ids == plain.generate(PUBLIC + SECRET, max_new_tokens=3).token_ids
    assert (found.public_tokens, found.prompt_tokens) == (len(tokens[0]), len(rest))


# Chats.


@pytest.mark.parametrize("system", [None, "Be brief.", " [user] ", "a", "aba"])
def test_the_beginning_of_a_chat(plain, system):
    """It ends where the user's first word begins, whatever the system's text and the user's have in common."""
    written = "" if system is None else f"[system]{system}</s>"
    assert beginning(plain.tokenizer, system) == f"{plain.tokenizer.bos_token}{written}[user]"
    for text in ("a", "aa", "b", "x", " a", "[user]"):
        messages = [] if system is None else [{"role": "system", "content": system}]
        rendered = render_chat(plain.tokenizer, [*messages, {"role": "user", "content": text}])
        public, secret = Request(text, chat=True, system=system, public_system=True).parts(lambda: plain.tokenizer)
        assert public == encode_rendered(plain.tokenizer, f"{plain.tokenizer.bos_token}{written}[user]")
        assert plain.tokenizer.decode([*public, *secret]) == rendered


LAST = "{{ bos_token }}{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
LAST += "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
LAST += "{{ m.content }}{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NUMBERED = "{{ bos_token }}{{ messages[-1].content | length }}" + GOES_ON


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (LAST, "Be brief.", "writes no system message before all that a user says; leave public_system out"),
        (BARE, None, "writes no system message before all that a user says"),
        (NUMBERED, None, "does not begin every conversation alike"),
    ],
    ids=["the system's message in the last one", "nothing before the user's", "a length of the user's"],
)
def test_a_template_without_a_public_beginning(tmp_path, template, system, message):
    with PrivateLlama.from_pretrained(str(with_template(tmp_path, template)), engine="plain") as llama:
        with pytest.raises(UsageError, match=message):
            llama.generate("hello", chat=True, system=system, public_system=True)
        llama.generate("hello", chat=True, system=system, max_new_tokens=1)


def test_a_system_message_by_messages(plain):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAID[0]}]
    found = plain.generate(messages=said, public_system=True, max_new_tokens=2)
    alike = plain.generate(SAID[0], system="Be brief.", chat=True, public_system=True, max_new_tokens=2)
    bare = plain.generate(messages=said, max_new_tokens=2)
    assert found.token_ids == alike.token_ids == bare.token_ids
    assert found.public_tokens == alike.public_tokens > 0
    assert found.public_tokens + found.prompt_tokens == bare.prompt_tokens


def test_turns_go_on_after_a_public_beginning(plain):
    chats = [plain.chat("Be brief.", max_new_tokens=4, public_system=public) for public in (True, False)]
    for text in SAID:
        for chat in chats:
            assert restarts(chat.stream(text)) == []
        mine, theirs = (chat.results[-1] for chat in chats)
        assert mine.token_ids == theirs.token_ids and chats[0]._cached == chats[1]._cached
        assert plain.tokenizer.decode(asked_for(chats[0], mine)) == render_chat(plain.tokenizer, chats[0].messages[:-1])
    tokens = [[(turn.public_tokens, turn.prompt_tokens) for turn in chat.results] for chat in chats]
    public = len(encode_rendered(plain.tokenizer, beginning(plain.tokenizer, "Be brief.")))
    assert [before for before, _ in tokens[0]] == [public, 0, 0]
    assert tokens[0][0][1] + public == tokens[1][0][1] and tokens[0][1:] == tokens[1][1:]
    chats[0].reset("Count.")
    chats[0].send(SAID[0])
    assert plain.result.public_tokens == len(encode_rendered(plain.tokenizer, beginning(plain.tokenizer, "Count.")))


def test_a_cache_that_begins_anew_begins_with_what_is_public(tmp_path):
    template = GOES_ON.replace(
        "{{ m.content }}", "{{ m.content.replace('4711', '0') if not loop.last else m.content }}"
    )
    with PrivateLlama.from_pretrained(str(with_template(tmp_path, template)), engine="plain") as llama:
        chat = llama.chat("Be brief.", max_new_tokens=3, public_system=True)
        chat.send(SAID[0])
        (restart,) = restarts(chat.stream(SAID[1]))
        result = llama.result
        assert result.public_tokens == chat.results[0].public_tokens > 0 == result.cached_tokens
        assert restart.prompt_tokens == result.prompt_tokens
        assert llama.generate(messages=chat.messages[:-1], max_new_tokens=3).token_ids == result.token_ids


def test_private_turns(private, plain):
    asked = {"max_new_tokens": 2, "prefill_chunk": 16}
    texts = clear_texts(plain, 2, "Be brief.", **asked)
    with private.chat("Be brief.", public_system=True, **asked) as chat, plain.chat("Be brief.", **asked) as expected:
        for text in texts:
            assert chat.send(text).token_ids == expected.send(text).token_ids
        assert chat._cached == expected._cached
        first, second = chat.results
        assert first.public_tokens and not second.public_tokens and second.cached_tokens
        told = f"public prefix: {first.public_tokens} tokens, known to all"
        assert [told in [entry["what"] for entry in turn.revealed] for turn in (first, second)] == [True, False]


def test_an_argument_that_no_chat_has(plain):
    with pytest.raises(UsageError, match="unknown argument 'public_prefix'"):
        plain.chat(public_prefix="a")


# Commands.


def asked(capsys, model, *options):
    command = ["generate", "--engine", "plain", "--model", str(model), "--max-new-tokens", "3", "--threads", "1"]
    code = main([*command, *options])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_generate(model, plain, tmp_path, capsys):
    whole = plain.generate(PUBLIC + SECRET, max_new_tokens=3)
    ids = encode_prompt(plain.tokenizer, PUBLIC)
    (tmp_path / "public.txt").write_text(PUBLIC + "\n")
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    for options in (
        ["--public-prefix", PUBLIC],
        ["--public-prefix", f"@{tmp_path / 'public.txt'}"],
        ["--public-prefix-ids", ",".join(map(str, ids))],
        ["--public-prefix-ids", f"@{tmp_path / 'ids.txt'}"],
    ):
        code, out, err = asked(capsys, model, "--prompt", SECRET, "--json", *options)
        result = json.loads(out[-1])
        assert (code, result["token_ids"], result["public_tokens"]) == (0, whole.token_ids, len(ids))
        assert f"public prefix: {len(ids)} tokens, known to all" in err
        assert f"{len(ids)} public and {whole.prompt_tokens - len(ids)} prompt tokens, 3 new" in err
    code, out, err = asked(capsys, model, "--prompt", SAID[0], "--chat", "--system", "Be brief.", "--public-system")
    assert code == 0 and "public prefix: " in err
    for options, message in (
        (["--public-prefix", "@/nowhere"], "--public-prefix: cannot read /nowhere"),
        (["--public-prefix-ids", "1,x"], "--public-prefix-ids takes whole numbers"),
        (["--public-prefix", "a", "--public-prefix-ids", "1"], "not allowed with argument"),
        (["--public-prefix-ids", "9999"], "token id 9999 is not in the vocabulary"),
        (["--public-system"], "public_system is of a chat; say chat as well (--chat)"),
        (["--public-prefix", "a", "--chat"], "made public with public_system (--public-system)"),
    ):
        code, out, err = asked(capsys, model, "--prompt", "b", *options)
        assert (code, out) == (2, []) and message in err.splitlines()[-1]


def test_a_file_of_prompts(model, plain, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (SECRET, " Where?")))
    options = ["--prompts", str(prompts), "--out", str(out)]
    assert asked(capsys, model, *options, "--public-prefix", PUBLIC)[0] == 0
    found = [json.loads(line)["token_ids"] for line in out.read_text().splitlines()]
    assert found == [plain.generate(PUBLIC + text, max_new_tokens=3).token_ids for text in (SECRET, " Where?")]
    code, _, err = asked(capsys, model, *options)
    assert code == 2 and "or by another model or settings" in err


def test_chat(model, plain, monkeypatch, capsys):
    assert chat_command(monkeypatch, model, SAID[:2], "--system", "Be brief.", "--public-system") == 0
    captured = capsys.readouterr()
    talk = plain.chat("Be brief.", max_new_tokens=3)
    assert captured.out == "".join(f"{talk.send(text).text}\n" for text in SAID[:2])
    count = len(encode_rendered(plain.tokenizer, beginning(plain.tokenizer, "Be brief.")))
    (line,) = [line for line in captured.err.splitlines() if "public prefix" in line]
    assert line.split()[0] == "all" and f"public prefix: {count} tokens" in line
