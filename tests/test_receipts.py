"""A request's receipt: what all parties sign of it, and what ``verify`` finds of it, whole, altered or not signed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace as replaced

import pytest
from endpoints import endpoint, opened, service
from hf_models import tiny
from msgspec.structs import replace
from programs import error_line
from starlette.testclient import TestClient

from crypten_llm import PrivateLlama, program, records
from crypten_llm.commands.cli import main
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.frames import HEADER
from crypten_llm.links.signatures import Signer
from crypten_llm.links.tls import make_key
from crypten_llm.serving.refusals import Refusal
from crypten_llm.serving.shelf import Shelf
from crypten_llm.session import verification
from crypten_llm.session.notary import Notary
from crypten_llm.session.receipt import Receipt, Receipts, Signed, digest_of_plans
from crypten_llm.session.request import Request

ROLES = ["owner", "client", "dealer"]
ASKED = {"input_ids": [5, 6, 7, 8], "max_new_tokens": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("m"), num_hidden_layers=1)[0])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    made = tmp_path_factory.mktemp("keys")
    for role in ROLES:
        make_key(made, role)
    return str(made)


@pytest.fixture(scope="module")
def results(folder, keys):
    """Of three requests of a session whose links are under TLS."""
    with PrivateLlama.from_pretrained(folder, engine="wire", tls=keys, threads=1) as llama:
        one = llama.generate(**ASKED)
        two = llama.generate([Request(**ASKED), Request(input_ids=[9, 10], max_new_tokens=2, policy="streaming_llm")])
        yield [one, *two]


@pytest.fixture(scope="module")
def receipt(results):
    return results[0].receipt


def marks(receipt, keys):
    return {finding.what: finding.holds for finding in verification.check(receipt, keys)}


def as_json(receipt):
    return json.loads(records.encode(receipt))


def tampered(receipt, change):
    """The receipt of which ``change`` has altered the JSON; read again as a file is."""
    plain = as_json(receipt)
    change(plain)
    return records.decode(json.dumps(plain), Receipt)


# What is in it.


def test_a_receipt_of_all_parties_holds(receipt, keys):
    found = list(verification.check(receipt, keys))
    assert all(finding.holds for finding in found)
    assert [finding.what for finding in found] == [
        "parties", "signature of owner", "signature of client", "signature of dealer", "messages", "facts"
    ]  # fmt: skip
    owner, client, dealer = (signed.part for signed in receipt.parts)
    assert [part.role for part in (owner, client, dealer)] == ROLES
    assert all(part.program == program.digest() for part in (owner, client, dealer))
    assert owner.model.weights and client.model.weights is None and dealer.model.weights is None
    assert owner.plans[0]["prompt_tokens"] == 4 and owner.plans[0]["policy"] == "full"


def test_its_ledger_is_the_answers(results):
    for result in (results[0], results[1]):
        expected = {(e["what"], e["to"], e["times"]) for e in result.revealed}
        for signed in result.receipt.parts:
            assert {(e.what, e.to, e.times) for e in signed.part.revealed} == expected


def test_it_holds_no_prompt_and_no_answer(receipt, results):
    text = records.encode(receipt).decode()
    for ids in (ASKED["input_ids"], results[0].token_ids):
        assert json.dumps(ids)[1:-1].replace(" ", "") not in text


def test_receipts_of_a_session_are_one_chain(results, keys):
    """What had passed when a request began is no less than what had when the one before it ended."""
    first, second, same = (result.receipt for result in results)
    assert second is same and marks(second, keys) == marks(first, keys)
    assert [signed.part.request for signed in second.parts] == [2, 2, 2]
    for before, after in zip(first.parts, second.parts, strict=True):
        assert before.part.model == after.part.model
        for role, passed in after.part.links.items():
            earlier = before.part.links[role].sent.after
            assert earlier.frames <= passed.sent.before.frames < passed.sent.after.frames or role == "dealer"


def test_what_is_asked_is_signed_whole(receipt, folder):
    plan = Request(**ASKED, hide_length=True).plan(4)
    assert {signed.part.asked for signed in receipt.parts} == {digest_of_plans([plan], None)}


# What is changed in it.


def leaves(value, path=()):
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from leaves(inner, (*path, key))
    else:
        yield path


def altered(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case None:
            return {"conversation": 1, "cached_tokens": 2}
        case str():
            middle = len(value) // 2
            return value[:middle] + ("0" if value[middle : middle + 1] != "0" else "1") + value[middle + 1 :]
    raise AssertionError(value)


def test_no_field_can_be_changed(receipt, keys):
    """Of each party: every number one more, every text another in one character, whatever the field."""
    tried = 0
    for path in leaves(as_json(receipt)):

        def change(plain, path=path):
            for step in path[:-1]:
                plain = plain[step]
            plain[path[-1]] = altered(plain[path[-1]])

        try:
            found = tampered(receipt, change)
        except records.Malformed:  # as a key that is no key is refused when it is read
            continue
        assert not all(marks(found, keys).values()), path
        tried += 1
    assert tried > 200


@pytest.mark.parametrize("role", ROLES)
def test_a_party_that_is_missing(receipt, keys, role):
    def without(plain):
        plain["parts"] = [signed for signed in plain["parts"] if signed["part"]["role"] != role]

    found = {f.what: f for f in verification.check(tampered(receipt, without), keys)}
    assert not found["parties"].holds and role in found["parties"].words


def test_parts_of_two_requests(results, keys):
    """Each is signed; together they are none's."""
    first, second = results[0].receipt, results[1].receipt
    mixed = Receipt((first.parts[0], *second.parts[1:]))
    found = marks(mixed, keys)
    assert not found["messages"] and not found["facts"] and found["signature of owner"]


def test_a_part_twice(receipt, keys):
    assert not marks(Receipt((*receipt.parts, receipt.parts[0])), keys)["parties"]


def test_signed_by_another_key(receipt, keys, tmp_path):
    """Which has changed what it likes, and signed that."""
    other = Signer.fresh()
    parts = list(receipt.parts)
    parts[0] = type(parts[0]).by(parts[0].part, other)
    found = {f.what: f for f in verification.check(Receipt(tuple(parts)), keys)}
    assert not found["signature of owner"].holds and "not that of owner" in found["signature of owner"].words
    assert found["signature of client"].holds and found["messages"].holds

    for role in ROLES:  # and the true receipt beside certificates of others
        make_key(tmp_path, role)
    assert list(marks(receipt, str(tmp_path)).values()) == [True, False, False, False, True, True]


def test_a_signature_of_another_role(receipt, keys, tmp_path):
    shutil.copytree(keys, tmp_path / "k")
    shutil.copy(tmp_path / "k/client.crt", tmp_path / "k/owner.crt")
    found = marks(receipt, str(tmp_path / "k"))
    assert not found["signature of owner"] and found["signature of client"]


# The command.


def test_the_command(receipt, keys, tmp_path, capsys):
    file = tmp_path / "r.json"
    Receipts((receipt,)).write(file)
    assert main(["verify", str(file), "--keys", keys]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("ok ") for line in lines)
    assert main(["verify", str(file)]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("NO ") == 3 and "--keys DIR" in shown.out and error_line(shown.err)
    file.write_text(file.read_text().replace('"request":1', '"request":2'))
    assert main(["verify", str(file), "--keys", keys]) == 1
    assert "changed after it was signed" in capsys.readouterr().out
    file.write_text("{}")
    assert main(["verify", str(file), "--keys", keys]) == 2
    assert "r.json" in error_line(capsys.readouterr().err)


def test_the_owner_can_open_its_commitment(results, keys, folder, tmp_path):
    receipt = results[0].receipt
    shown = verification.check_weights(receipt, folder, keys)
    assert shown.holds
    opening = shown.words.rpartition(" ")[2]
    assert verification.check_weights(receipt, folder, opening=opening).holds
    assert not verification.check_weights(receipt, folder, opening="00" * 32).holds
    other = str(tiny(tmp_path / "o", num_hidden_layers=1, seed=1)[0])
    assert not verification.check_weights(receipt, other, keys).holds
    assert not verification.check_weights(receipt, other, opening=opening).holds
    with pytest.raises(UsageError, match="--opening"):
        verification.check_weights(receipt, folder)
    with pytest.raises(UsageError, match="hex digits"):
        verification.check_weights(receipt, folder, opening="x")


# At the client, and at its endpoint.


def test_an_altered_message_is_found_at_the_end_of_the_answer(folder):
    """A bit that flips on a plain link leaves no trace in a share: another answer would come, and nobody know."""
    with PrivateLlama.from_pretrained(folder, engine="wire", threads=1) as llama:
        link, calls = llama.party.transport._links[0], []
        receive = link.receive_into

        def altering(views):
            came = receive(views)
            if views[0].nbytes != HEADER.size and came:
                calls.append(came)
                if len(calls) == 20:
                    views[0][0] ^= 1
            return came

        link.receive_into = altering
        with pytest.raises(PartyError, match="rank 0 .owner. sent something else than what reached rank 1 .client."):
            llama.generate(**ASKED)
        assert len(calls) > 20 and not llama.is_open


def test_a_party_that_signs_for_another_is_refused(receipt, mesh):
    owner, client, dealer = receipt.parts
    notary = Notary(mesh(3)[1], ROLES)
    for wrong in ((), (client,), (owner, owner)):
        with pytest.raises(PartyError, match="rank 0 .owner. sent something else"):
            notary.gather([0], {0: wrong, 1: (client,), 2: (dealer,)})
    other = Signed(replace(dealer.part, revealed=()), None, None)
    with pytest.raises(PartyError, match="differ in the ledger"):
        notary.gather([0], {0: (owner,), 1: (client,), 2: (other,)})
    notary.gather([0], {0: (owner,), 1: (client,), 2: (dealer,)})
    assert notary.take(0) == receipt and notary.take(0) is None


def test_an_endpoint_gives_receipts_of_its_answers(folder):
    asked = {"prompt": [5, 6, 7], "max_tokens": 2, "n": 2, "seed": 1, "temperature": 1.0}
    with service(opened(folder, engine="wire"), room=8) as made:
        app = endpoint(made, ["a" * 16, "b" * 16]).app()
        one, other = (
            TestClient(app, base_url="http://localhost", headers={"Authorization": f"Bearer {key * 16}"})
            for key in "ab"
        )
        whole = one.post("/v1/completions", json=asked).json()
        path = whole["crypten_llm"]["receipt"]
        assert path == f"/v1/receipts/{whole['id']}"
        with one.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
            pieces = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        streamed = pieces[-1]["crypten_llm"]["receipt"]
        for found in (path, streamed):
            receipts = records.decode(one.get(found).content, Receipts).receipts
            assert len(receipts) == 2
            for receipt in receipts:
                found = marks(receipt, "")
                assert [what for what, holds in found.items() if not holds] == [f"signature of {r}" for r in ROLES]
        refused = other.get(path)
        assert refused.status_code == 404 and "no receipt" in refused.json()["error"]["message"]
        assert one.get("/v1/receipts/cmpl-0").status_code == 404


def test_only_the_last_receipts_are_kept(results):
    shelf = Shelf(room=2)
    for name in "abc":
        shelf.put("", name, results[:1])
    assert shelf.get("", "c").receipts == shelf.get("", "b").receipts == (results[0].receipt,)
    with pytest.raises(Refusal):
        shelf.get("", "a")
    shelf.put("", "plain", [replaced(results[0], receipt=None)])
    with pytest.raises(Refusal):
        shelf.get("", "plain")


def test_on_crypten_the_compute_parties_sign(folder, keys):
    with PrivateLlama.from_pretrained(folder, engine="crypten", tls=keys, threads=1) as llama:
        receipt = llama.generate(input_ids=[5, 6], max_new_tokens=1).receipt
    assert [signed.part.role for signed in receipt.parts] == ["owner", "client"]
    assert all(marks(receipt, keys).values())


def test_a_receipt_is_written_by_generate(folder, tmp_path, capsys):
    file = str(tmp_path / "r.json")
    words = ["generate", "--model", folder, "--prompt-ids", "5,6,7", "--max-new-tokens", "1", "--threads", "1"]
    assert main([*words, "--receipt", file]) == 0
    (receipt,) = verification.read(file).receipts
    assert receipt.parts[0].part.plans[0]["prompt_tokens"] == 3 and receipt.parts[0].signature is None
    assert main([*words, "--engine", "plain", "--receipt", file]) == 2
    assert "--receipt" in error_line(capsys.readouterr().err)
