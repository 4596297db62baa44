"""Answers that follow a schema or a grammar, whatever the logits; what cannot be followed is refused in time."""

import json
import time

import pytest
import torch
from hf_models import with_tokenizer
from jsonschema import Draft202012Validator, FormatChecker

from crypten_llm import PrivateLlama, limits
from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.tokenizer import load
from crypten_llm.session import grammar as grammars
from crypten_llm.session.grammar import Grammars, NotFollowed, of_schema
from crypten_llm.session.prompted import Answer
from crypten_llm.session.sampling import Sampler, SamplingConfig
from crypten_llm.session.text import Detokenizer

VOCABULARY, END = 2048, 1
MOST_TOKENS = 500


def closed(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SHORT, SMALL = {"type": "string", "maxLength": 8}, {"type": "integer", "minimum": -20, "maximum": 300}
SCHEMAS = {
    "object": closed(name=SHORT, age=SMALL, member={"type": "boolean"}),
    "optional": {"type": "object", "properties": {"a": SMALL, "b": SHORT}, "additionalProperties": False},
    "list": {"type": "array", "items": closed(x=SMALL), "minItems": 1, "maxItems": 3},
    "enum": {"enum": ["red", "green", 5, None, {"a": [1, 2]}]},
    "number": {"type": "number", "minimum": -3.25, "maximum": 17.5, "multipleOf": 0.25},
    "any of": {"anyOf": [closed(kind={"const": "a"}, n=SMALL), closed(kind={"const": "b"}, s=SHORT)]},
    "one of": {"oneOf": [closed(kind={"const": "a"}), closed(kind={"const": "b"}, s=SHORT)]},
    "reference": {"$defs": {"p": closed(x=SMALL)}, **closed(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"})},
    "pattern": closed(id={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"}),
    "date": closed(day={"type": "string", "format": "date"}),
    "text": {"type": "string", "minLength": 3, "maxLength": 12},
    "tuple": {"type": "array", "prefixItems": [SMALL, SHORT], "items": False, "minItems": 2},
}
# Free where nothing bounds what random logits write: cut as a rule, and right where it is whole.
FREE = {"any object": {"type": "object"}, "named and free": {"type": "object", "properties": {"a": SMALL}}}


@pytest.fixture(scope="module")
def tokenizer():
    return load(SHIPPED)


@pytest.fixture(scope="module")
def made(tokenizer):
    return Grammars(tokenizer)


def answered(tokenizer, grammar, logits, config, most=MOST_TOKENS):
    """The answer that grows as at the client; logits: of the next token."""
    guide = grammar.guide([END])
    answer = Answer([], Sampler(config, (), guide), (END,), Detokenizer(tokenizer), guide=guide)
    for step in range(most):
        answer.take(logits(), last=step == most - 1)
        if answer.finished:
            break
    if answer.failed is not None:
        raise answer.failed
    return answer


def noise(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return lambda: scale * torch.randn(VOCABULARY, generator=generator)


def distinct(pairs):
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def check(text, schema):
    value = json.loads(text, object_pairs_hook=distinct)
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_logits_an_answer_is_whole_and_valid(made, tokenizer, name):
    """Of small schemas, which any walk through them ends."""
    grammar = made.compiled(of_schema(SCHEMAS[name]))
    texts = set()
    for seed in range(8):
        config = SamplingConfig(do_sample=True, temperature=1.5, top_p=0.9, seed=seed) if seed % 2 else SamplingConfig()
        answer = answered(tokenizer, grammar, noise(seed, 4.0), config)
        assert answer.finished, answer.text.text
        check(answer.text.text, SCHEMAS[name])
        texts.add(answer.text.text)
    assert len(texts) > 1


@pytest.mark.parametrize("name", FREE)
def test_what_is_cut_is_a_beginning(made, tokenizer, name):
    """Where the end is likely: it is drawn as soon as it is allowed, and never before."""
    grammar, whole = made.compiled(of_schema(FREE[name])), 0
    for seed in range(12):
        answer = answered(tokenizer, grammar, noise(seed, 3.0), SamplingConfig(), most=60)
        if answer.finished:
            whole += 1
            check(answer.text.text, FREE[name])
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(answer.text.text)
    likely = torch.zeros(VOCABULARY)
    likely[[END, tokenizer.encode("{}", add_special_tokens=False)[-1]]] = torch.tensor([9.0, 5.0])
    answer = answered(tokenizer, grammar, lambda: likely, SamplingConfig())
    check(answer.text.text, FREE[name])


def test_all_that_is_allowed_may_be_drawn(made, tokenizer):
    """A mask forbids no token that goes on: each value of an enumeration comes, and of no other."""
    values = ["yes", "no", "maybe", "7", "-7"]
    grammar = made.compiled("start: " + " | ".join(json.dumps(value) for value in values))
    found = {answered(tokenizer, grammar, noise(seed, 1.0), SamplingConfig()).text.text for seed in range(60)}
    assert found == set(values)


@pytest.mark.parametrize(
    "schema, text, ends", [(closed(n=SMALL), '{"n": 12}', False), ({"type": "integer", "maximum": 99}, "1", True)]
)
def test_it_ends_with_the_token_that_makes_it_whole(made, tokenizer, schema, text, ends):
    """Where nothing can follow no token is spent on the end; where something can, the end is drawn."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows = torch.zeros(len(ids) + 1, VOCABULARY)
    rows[range(len(ids) + 1), [*ids, END]] = 5.0
    answer = answered(tokenizer, made.compiled(of_schema(schema)), iter(rows).__next__, SamplingConfig())
    assert answer.text.text == text and answer.token_ids == [*ids, *[END] * ends]


def test_a_complete_answer_goes_on_being_masked(made, tokenizer):
    """For nothing, so that a hidden end takes as long; its text and tokens stay."""
    grammar = made.compiled(of_schema({"enum": ["a"]}))
    answer = answered(tokenizer, grammar, noise(0, 1.0), SamplingConfig())
    text, ids = answer.text.text, list(answer.token_ids)
    for _ in range(5):
        assert answer.take(noise(1, 1.0)()) == ("", None)
    assert (answer.text.text, answer.token_ids, answer.failed) == (text, ids, None)


def test_an_end_that_is_text_ends_nothing(made, tokenizer):
    """Of an answer within a grammar: it would stand in it. Special tokens are no text of it either."""
    (brace,) = tokenizer.encode("}", add_special_tokens=False)
    guide = made.compiled(of_schema({"type": "object"})).guide([END, brace])
    mask = guide.mask(torch.zeros(VOCABULARY)) > -torch.inf
    assert not mask[[0, 1, 2, brace]].any()
    free = made.compiled(r"start: /(.|\n)*/").guide([END])
    mask = free.mask(torch.zeros(VOCABULARY + 100)) > -torch.inf
    assert mask[END] and not mask[[0, 2]].any() and not mask[VOCABULARY:].any() and mask.sum() > 1900


def test_among_few_logits(made, tokenizer):
    guide = made.compiled(of_schema({"type": "object"})).guide([END])
    best = torch.full((VOCABULARY,), -torch.inf)
    best[[50, 60]] = 1.0
    with pytest.raises(NotFollowed, match="none of the 2 tokens that the client was shown goes on within the schema"):
        guide.mask(best)
    best[tokenizer.encode("{", add_special_tokens=False)] = 0.0
    assert int(guide.mask(best).argmax()) == tokenizer.encode("{", add_special_tokens=False)[0]


def nested(depth):
    chain = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(depth)}
    return {"$defs": {**chain, f"d{depth}": {"type": "null"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "schema, says",
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"type": "string", "format": "mood"}, "Unknown format: mood"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"$ref": "https://example.org/schema"}, "does not fetch"),
        (nested(1500), "nested too deeply"),  # ends a process that compiles it with a usual stack
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
    ],
    ids=str,
)
def test_what_cannot_be_followed(made, schema, says):
    with pytest.raises(UsageError, match=says) as refused:
        made.compiled(of_schema(schema))
    assert "\n" not in str(refused.value) and "schema" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 1234567},
        {"type": "integer", "multipleOf": 10**9 - 1},
        {"allOf": [{"anyOf": [closed(**{f"k{i}{j}": SMALL}) for j in range(4)]} for i in range(20)]},
        {"type": "string", "pattern": "^(((a{1000}){1000}){1000})$"},
        nested(10**4),
        {"type": "string", "pattern": "(" * 5000 + "a" + ")*" * 5000},
    ],
    ids=range(6),
)
def test_a_hostile_schema_is_followed_or_refused_in_seconds(made, tokenizer, schema):
    started = time.monotonic()
    try:
        answered(tokenizer, made.compiled(of_schema(schema)), noise(0, 1.0), SamplingConfig(), most=200)
    except UsageError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - started < 60


def test_one_that_hangs_is_given_up(made, monkeypatch):
    monkeypatch.setattr(grammars, "TRIAL_SECONDS", 0.001)
    with pytest.raises(UsageError, match="to compile, or is nested too deeply"):
        made.compiled(of_schema({"type": "integer", "minimum": 4}))


def test_one_that_outgrows_the_library_ends_the_answer_alone(made, tokenizer):
    """A step of which it gives up: the answer failed, the draw does not raise, and what follows is for nothing."""
    grammar = made.compiled(of_schema({"type": "string", "pattern": "^(.*[ab].{0,300}){8}bbbbbbbb$"}))
    guide = grammar.guide([END])
    answer = Answer([], Sampler(SamplingConfig(), (), guide), (END,), Detokenizer(tokenizer), guide=guide)
    random = noise(3, 1.0)
    for _ in range(3000):
        answer.take(random())
        if answer.finished:
            break
    assert "too large to be followed" in str(answer.failed), (answer.failed, len(answer.token_ids))
    assert answer.take(random()) == ("", None)


def test_what_was_compiled_is_kept(made, monkeypatch):
    made.compiled(of_schema(SCHEMAS["object"]))
    monkeypatch.setattr(grammars, "_try", None)
    assert made.compiled(of_schema(SCHEMAS["object"]))
    monkeypatch.setattr(grammars, "KEPT", 1)
    monkeypatch.setattr(grammars, "_try", lambda text: None)
    made.compiled(of_schema({"const": "kept"}))
    assert list(made._kept) == [of_schema({"const": "kept"})]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"json_schema": []}, "must be an object"),
        ({"json_schema": {"type": "object"}, "grammar": "start: /a/"}, "give one of them"),
        ({"json_schema": {"type": "object"}, "stop": "x"}, "stop would cut"),
        ({"json_schema": {"enum": ["x" * limits.GRAMMAR]}}, "is the most"),
        ({"json_schema": {"const": float("nan")}}, "what JSON has not"),
        ({"grammar": 5}, "must be a text"),
        ({"tools": []}, "tools are of a chat"),
    ],
)
def test_requests_that_cannot_be(arguments, says):
    from crypten_llm.session.request import Request

    with pytest.raises(UsageError, match=says):
        Request("a", **arguments)


def test_in_python(tmp_path):
    schema = SCHEMAS["object"]
    with PrivateLlama.from_pretrained(str(with_tokenizer(tmp_path)), engine="plain", threads=1) as llama:
        result = llama.generate("One", json_schema=schema, max_new_tokens=56)
        check(result.text, schema)
        assert result.finish_reason == "stop"
        both = llama.generate(["One", "Two"], grammar='start: "yes" | "no"', max_new_tokens=9, hide_length=True)
        assert {each.text for each in both} <= {"yes", "no"}
        with pytest.raises(UsageError, match="Invalid type"):
            llama.generate("One", json_schema={"type": "objct"})
        assert llama.generate("One", max_new_tokens=1).token_ids


@pytest.mark.parametrize("mode, says", [("tokens", "--reveal tokens does not show"), ("top-2", "none of the 2 tokens")])
def test_where_less_is_shown(tmp_path, mode, says):
    """An answer that cannot go on is no end of the session."""
    folder = str(with_tokenizer(tmp_path))
    with PrivateLlama.from_pretrained(folder, engine="plain", threads=1, reveal=mode) as llama:
        for hides in (False, True):
            with pytest.raises(UsageError, match=says):
                llama.generate("One", json_schema={"type": "object"}, max_new_tokens=4, hide_length=hides)
        assert llama.generate("One", max_new_tokens=2).token_ids
