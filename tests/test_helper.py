"""Thin clients: answers without weights or shares, from an owner and a helper of whom neither reads the prompt."""

import json
import os
import secrets
import shutil
import signal
import socket
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from endpoints import client, service
from hf_models import tiny, with_template
from programs import by_hand, error_line, free_port
from wire_parties import CLIENT, OWNER, run

from crypten_llm.commands import cli
from crypten_llm.commands.cost import predict, predict_turns
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import keyring, tls
from crypten_llm.protocols import points
from crypten_llm.protocols.embedding import one_hot
from crypten_llm.session import thin_client
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.doors import place_of
from crypten_llm.session.local_helper import LocalHelper
from crypten_llm.session.plan import Plan
from crypten_llm.session.settings import split
from crypten_llm.session.thin import pad_of, seed_of, token_bytes
from experiments.tools import real_model

PROMPT = [5, 9, 2, 61, 7, 7, 30]


@pytest.mark.parametrize("vocabulary", [1, 97, 512, 513, 1600, 49152])
def test_two_keys_are_one_token(vocabulary):
    for token in {0, vocabulary // 2, min(511, vocabulary - 1), vocabulary - 1}:
        seeds = secrets.token_bytes(16), secrets.token_bytes(16)
        made = points.make(token, vocabulary, *seeds)
        assert len(made) == points.corrections_size(vocabulary)
        parts = [points.bits([(seed, made)], bool(which), vocabulary) for which, seed in enumerate(seeds)]
        assert torch.equal(parts[0] ^ parts[1], one_hot(torch.tensor([token]), 1, vocabulary))
    with pytest.raises(ValueError, match="not in a vocabulary"):
        points.make(vocabulary, vocabulary, *seeds)


def test_a_key_looks_alike_for_every_token():
    """Each of a party's bits, and each bit of what both are sent, is set in half of the keys of one token."""
    vocabulary, count, seen = 1100, 400, []
    for token in (0, 1099):
        keys, sent = [], []
        for _ in range(count):
            seeds = secrets.token_bytes(16), secrets.token_bytes(16)
            made = points.make(token, vocabulary, *seeds)
            keys.append((seeds[1], made))
            sent.append(list(made))
        words = points.bits(keys, True, vocabulary).view(torch.uint8)[:, : vocabulary // 8]
        both = torch.cat([words, torch.tensor(sent, dtype=torch.uint8)], dim=1)
        seen.append((both[:, :, None] >> torch.arange(8) & 1).double().mean(0).view(-1))
    flags = [8 * (vocabulary // 8 + 17 * level + 16) + bit for level in range(2) for bit in range(2, 8)]
    for rate in seen:
        assert (rate[flags] == 0).all(), "of a byte with two bits"
        rate[flags] = 0.5
        assert (rate - 0.5).abs().max() < 6 * 0.5 / count**0.5


def test_what_is_passed_on_is_the_value_behind_a_pad():
    """For whoever has the pad, to a unit; for the helper, uniform words of as many bits."""
    values = torch.tensor([[0.0, 1.5, -3.25, 700.0]])

    def job(runtime, key):
        engine = WireEngine(runtime.transport, runtime=runtime)
        held = engine.secret(runtime.held_by(OWNER, values), values.shape, OWNER)
        pad = (lambda shape, bits: pad_of(key, 1, shape)) if runtime.held_by(OWNER, key) else None
        return engine.pass_on((held, held), CLIENT, pad)

    key = bytes(32)
    owner, client, dealer = run(lambda runtime: job(runtime, key)).results
    assert [[each.words for each in seen] for seen in (owner, dealer)] == [[None, None]] * 2
    for passed in client:
        shown = replace(passed, words=None).value(passed.packed(), pad_of(key, 1, passed.shape))
        assert (shown - values).abs().max() <= 2.0**-16
        assert (passed.words != 0).all() and passed.nbytes == passed.packed().numel()
    assert seed_of(key, 1) != seed_of(key, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=1)[0])


@contextmanager
def helper(model, **settings):
    """Settings of a thin client for parties that run on this machine."""
    protocol, launch = split({"helper_at": "local", "threads": 1, "timeout": 60, **settings})
    children, before = LocalHelper(protocol, launch, model), os.environ.get(keyring.VARIABLE)
    os.environ[keyring.VARIABLE] = children.secret
    try:
        children.meet()
        at = {"helper_at": children.helper_at, "owner_at": children.owner_at}
        yield {"threads": 1, "timeout": 60, **settings, **at}
    finally:
        os.environ.pop(keyring.VARIABLE)
        if before is not None:
            os.environ[keyring.VARIABLE] = before
        children.stop()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Folders of all roles, and of two more clients, whose certificates one file holds."""
    folders = [tmp_path_factory.mktemp("keys") for _ in range(3)]
    for role in ("owner", "helper", "dealer"):
        made = tls.make_key(folders[0], role)
        for folder in folders[1:]:
            shutil.copy(made.certificate, folder)
    clients = [tls.make_key(folder, "client") for folder in folders]
    clients[0].certificate.write_bytes(b"".join(made.certificate.read_bytes() for made in reversed(clients)))
    tls.make_key(stranger := tmp_path_factory.mktemp("stranger"), "client")
    for role in ("owner", "helper", "dealer"):
        shutil.copy(folders[0] / f"{role}.crt", stranger)
    return [*folders, stranger]


@pytest.fixture(scope="module")
def parties(model, keys):
    """With TLS; whose settings these are is one of its clients."""
    with helper(model, tls=str(keys[0])) as settings:
        yield {**settings, "tls": str(keys[1])}


@pytest.fixture(scope="module")
def expected(model):
    with PrivateLlama.from_pretrained(model, engine="plain") as llama:
        yield lambda ids, **asked: llama.generate(input_ids=ids, **asked).token_ids


def test_clients_come_one_after_another_and_their_bytes_are_counted(parties, model, expected):
    asked = {"max_new_tokens": 4, "prefill_chunk": 3, "eos_token_id": []}
    asked |= {"do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 4}  # the client's own affair
    for hide_length in (False, True):
        with PrivateLlama.from_pretrained(model, **parties) as llama:
            result = llama.generate(input_ids=PROMPT, hide_length=hide_length, **asked)
            assert result.token_ids == expected(PROMPT, **asked)
            plan = Plan(len(PROMPT), 4, 3, hide_length)
            found = predict(llama.config, plan, helper=True)
            cost = result.cost
            assert {phase: cost.thin_bytes((phase,)) for phase in found.thin} == found.thin
            assert cost.rounds() == found.cost.rounds() == predict(llama.config, plan).cost.rounds()
            assert cost.bytes_sent() == found.cost.bytes_sent()
            assert [len(each.part.links) for each in result.receipt.parts] == [2, 2, 2]
            assert cost.names(llama.protocol.roles) == ["owner", "helper", "dealer", "client"]


def test_who_leaves_in_the_midst_leaves_the_helper_to_others(parties, model, expected):
    """With a hidden length its steps are run to their end, with the last token that it gave."""
    for hide_length in (False, True):
        llama = PrivateLlama.from_pretrained(model, **parties)
        (plan, answer), ids = (Plan(len(PROMPT), 6, hide_length=hide_length), None), PROMPT
        answer = thin_client.Answer(ids, lambda logits: int(logits.argmax()))
        events = llama.party.request_together([plan], [answer])
        while not answer.token_ids:
            next(events)
        llama.party.transport.close()
    with PrivateLlama.from_pretrained(model, **parties) as llama:
        assert llama.generate(input_ids=PROMPT, max_new_tokens=3).token_ids == expected(PROMPT, max_new_tokens=3)


def test_a_conversation_is_its_clients_alone(parties, model):
    from crypten_llm.session import stocked
    from crypten_llm.session.plan import Turn
    from crypten_llm.session.request import Taken

    def turn(llama, cached):
        request = llama.prepare(_request(), turn=Turn(1, cached))
        return stocked.run(llama.party, [request.plan], [request.answer(None)], Taken(), (request.turn,))

    def _request():
        from crypten_llm.session.request import Request

        return Request(input_ids=PROMPT, max_new_tokens=2, eos_token_id=[])

    with PrivateLlama.from_pretrained(model, **parties) as llama:
        list(turn(llama, 0))
        held = llama.party.kept[1].length
        assert held == len(PROMPT) + 1
        list(turn(llama, held))
    with PrivateLlama.from_pretrained(model, **parties) as llama:
        with pytest.raises(UsageError, match="goes on with a conversation that is not here"):
            list(turn(llama, held))
        llama.close()


def test_who_is_started_otherwise_is_refused(parties, model):
    with pytest.raises(UsageError, match="the helper has reveal 'logits' and this client 'tokens'"):
        PrivateLlama.from_pretrained(model, **parties, reveal="tokens")
    with pytest.raises(UsageError, match="one prompt at a time"):
        with PrivateLlama.from_pretrained(model, **parties) as llama:
            llama.party.check_plans([Plan(3, 1)] * 2)
    swapped = {**parties, "helper_at": parties["owner_at"], "owner_at": parties["helper_at"], "timeout": 0.5}
    with pytest.raises(PartyError, match=r"rank 0 \(helper\) did not .* --helper and --owner may be swapped"):
        PrivateLlama.from_pretrained(model, **swapped)
    for text in ("host", "host:", ":1", "host:0", "host:70000", "host:1x"):
        with pytest.raises(UsageError, match="as HOST:PORT"):
            place_of("--helper", text)
    assert place_of("--helper", "[::1]:29501") == ("::1", 29501)


def test_a_stranger_is_turned_away(parties, keys, model, monkeypatch, expected):
    """One without a key that is pinned; one with another secret, or without TLS; and one of no protocol."""
    for other in ({"tls": str(keys[3])}, {"tls": ""}):
        with pytest.raises((PartyError, UsageError), match="did not complete the greeting|disagree on the links"):
            PrivateLlama.from_pretrained(model, **{**parties, **other, "timeout": 0.5})
    monkeypatch.setenv(keyring.VARIABLE, "another secret of thirty-two characters or more")
    with pytest.raises(PartyError, match="did not complete the greeting"):
        PrivateLlama.from_pretrained(model, **{**parties, "timeout": 0.5})
    monkeypatch.undo()
    parties = {**parties, "tls": str(keys[2])}
    with socket.create_connection(place_of("--helper", parties["helper_at"])) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with PrivateLlama.from_pretrained(model, **parties) as llama:
            assert llama.generate(input_ids=PROMPT, max_new_tokens=2).token_ids == expected(PROMPT, max_new_tokens=2)


def test_an_endpoint_in_front(parties, model):
    """One answer after another, each with its own cost and the price that was told; a cache is gone on with."""
    opening = partial(PrivateLlama.from_pretrained, model, **parties)
    with service(opening, predict=predict_turns, engine="wire", together=1) as made:
        http = client(made)
        found = []
        for prompt in ([5, 9, 2], PROMPT):
            body = {"prompt": prompt, "max_tokens": 3, "n": 2, "seed": 1, "temperature": 0.8, "hide_length": True}
            price = http.post("/v1/price", json=body).json()
            assert "rounds" in price, price
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            facts = answer.json()["crypten_llm"]
            assert len(answer.json()["choices"]) == 2
            assert (facts["rounds"], facts["bytes_sent"]) == (price["rounds"], price["bytes_sent"])
            found.append(facts)
        assert found[0]["bytes_sent"] < found[1]["bytes_sent"]
        assert http.get("/health").json()["state"] == "Available"


@pytest.mark.slow
@pytest.mark.parametrize("reveal", ["tokens", "top-5"])
def test_less_than_all_logits(model, expected, reveal):
    with helper(model, reveal=reveal) as settings:
        with PrivateLlama.from_pretrained(model, **settings) as llama:
            result = llama.generate(input_ids=PROMPT, max_new_tokens=3)
            assert result.token_ids == expected(PROMPT, max_new_tokens=3)
            found = predict(llama.config, Plan(len(PROMPT), 3, hide_length=True, reveal=reveal), helper=True)
            assert {phase: result.cost.thin_bytes((phase,)) for phase in found.thin} == found.thin
            assert result.cost.thin_bytes(("decode",))[1] < 2 * 300, "no logits of a vocabulary"


@pytest.mark.slow
def test_a_conversation_goes_on(tmp_path):
    """In a chat, and in front of an endpoint, which keeps it between two requests."""
    model, said = str(with_template(tmp_path)), ("The passkey is 4711.", "What is it?")
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": []}
    with PrivateLlama.from_pretrained(model, engine="plain") as llama, llama.chat(**asked) as chat:
        expected = [chat.send(text).text for text in said]
    with helper(model) as settings:
        more = {**asked, "public_system": True}
        with PrivateLlama.from_pretrained(model, **settings) as llama, llama.chat("Be brief.", **more) as chat:
            first, second = (chat.send(text) for text in said)
            assert second.cached_tokens == first.public_tokens + first.prompt_tokens + 3 and first.public_tokens
        with PrivateLlama.from_pretrained(model, **settings) as llama, llama.chat(**asked) as chat:
            assert [chat.send(text).text for text in said] == expected
            first, second = chat.results
            assert second.cached_tokens == first.prompt_tokens + 3 and second.prompt_tokens < first.prompt_tokens + 20
        with service(partial(PrivateLlama.from_pretrained, model, **settings), engine="wire", together=1) as made:
            http, messages, cached = client(made), [], []
            for text in said:
                messages.append({"role": "user", "content": text})
                body = {"messages": messages, "max_tokens": 4, "temperature": 0, "hide_length": False}
                found = http.post("/v1/chat/completions", json=body).json()
                messages.append(found["choices"][0]["message"] | {"role": "assistant"})
                cached.append(found["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0))
            assert cached[0] == 0 < cached[1]


@pytest.mark.slow
def test_at_the_terminal(model, capsys):
    words = ["generate", "--helper", "local", "--model", model, "--prompt-ids", "5,9,2", "--max-new-tokens", "2"]
    assert cli.main([*words, "--json", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])
    assert found["thin_client"]["bytes_sent"] > 3 * token_bytes(97)
    assert "the thin client: prefill" in shown.err and "peak memory: owner" in shown.err
    assert cli.main(["cost", "--model", model, "--prompt-tokens", "3", "--helper", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["thin_client"].keys() == {"prefill", "decode"} and "helper" in shown["memory"]


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1, 2])
def test_each_party_by_its_own_command(model, keys, capsys, who):
    """Each takes clients at the port at which it met the others. The end of one ends all, which say whose it was."""
    owner_at, helper_at = free_port(), free_port()
    asked = ["helper", "--timeout", "60", "--threads", "1", "--model", model, "--link-port", str(helper_at)]
    programs = by_hand(3, "-m", "crypten_llm", *asked, "--tls", str(keys[0]), port=owner_at)
    with programs[0], programs[1], programs[2]:
        programs[1].read_until(f"clients: --helper 127.0.0.1:{helper_at} --owner 127.0.0.1:{owner_at};")
        places = ["--helper", f"127.0.0.1:{helper_at}", "--owner", f"127.0.0.1:{owner_at}", "--tls", str(keys[1])]
        words = ["generate", *places, "--model", model, "--prompt-ids", "5,9,2", "--max-new-tokens", "2", "--json"]
        found = []
        for _ in range(2):
            assert cli.main([*words, "--threads", "1", "--receipt", str(keys[1] / "receipt")]) == 0
            found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"])
        assert found[0] == found[1]
        assert cli.main(["verify", str(keys[1] / "receipt"), "--keys", str(keys[1])]) == 0
        os.kill(programs[who].process.pid, signal.SIGKILL)
        for rank in {0, 1, 2} - {who}:
            code, _, err = programs[rank].finish()
            assert code == 3 and f"rank {who} ({('owner', 'helper', 'dealer')[who]})" in error_line(err)
        programs[who].finish()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_published_model():
    """Three processes take some 6 GB; the client has a tokenizer and no weights."""
    path = real_model.find()
    if path is None:
        pytest.skip(real_model.ABSENT)
    prompt, asked = "The capital of France is", {"max_new_tokens": 3, "do_sample": False}
    with PrivateLlama.from_pretrained(str(path), engine="plain", threads=1) as llama:
        expected = llama.generate(prompt, **asked).token_ids
    with helper(str(path), timeout=600) as settings, PrivateLlama.from_pretrained(str(path), **settings) as llama:
        result = llama.generate(prompt, **asked)
        assert result.token_ids == expected
        found = predict(llama.config, Plan(result.prompt_tokens, 3, hide_length=True), helper=True)
        assert {phase: result.cost.thin_bytes((phase,)) for phase in found.thin} == found.thin
        assert found.thin["decode"][0] < 500 and result.cost.rounds() == found.cost.rounds()
