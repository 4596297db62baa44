"""Text of an answer: a stop string ends it, and no part of one is ever shown."""

import random

import pytest
from hf_models import SHIPPED

from crypten_llm.errors import UsageError
from crypten_llm.models import tokenizer as tokenizers
from crypten_llm.session.text import Detokenizer, check_stops


class Letters:
    """A tokenizer of which every token is the text that it is made with."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def decode(self, ids, skip_special_tokens):
        return "".join(self.tokens[i] for i in ids)


def shown(tokens, stops):
    """What is shown of all tokens, until a stop string ends them, and whether it did."""
    text = Detokenizer(Letters(*tokens), stops)
    pieces = []
    for place in range(len(tokens)):
        pieces.append(text.push(place, place + 1 == len(tokens)))
        assert "".join(pieces) == text.text
        if text.stopped:
            break
    return pieces, text


def reference(tokens, stops):
    """The text before the first stop string in what has come, token by token."""
    whole = ""
    for token in tokens:
        whole += token
        if found := [whole.index(stop) for stop in stops if stop in whole]:
            return whole[: min(found)], True
    return whole, False


@pytest.mark.parametrize("seed", range(200))
def test_random_texts_end_where_they_should_and_show_no_part_of_a_stop(seed):
    rng = random.Random(seed)
    tokens = ["".join(rng.choices("ab\n", k=rng.randint(0, 3))) for _ in range(rng.randint(1, 12))]
    stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
    expected, stopped = reference(tokens, stops)
    pieces, text = shown(tokens, stops)
    assert ("".join(pieces), text.stopped) == (expected, stopped)


@pytest.mark.parametrize("seed", range(200))
def test_what_is_held_back_is_never_more_than_a_stop_may_begin_with(seed):
    rng = random.Random(seed)
    tokens = rng.choices("abc", k=20)
    stops = ["".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(2)]
    text = Detokenizer(Letters(*tokens), stops)
    for place in range(len(tokens)):
        text.push(place, False)
        if text.stopped:
            break
        come = "".join(tokens[: place + 1])
        held = come[len(text.text) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        assert len(held) < max(map(len, stops))


def test_a_stop_over_several_tokens():
    pieces, text = shown(["Hi", "\nUs", "e", "r: and", " more"], ["\nUser:"])
    assert (pieces, text.text, text.stopped) == (["Hi", "", "", ""], "Hi", True)


def test_what_turns_out_to_be_no_stop_is_shown():
    pieces, text = shown(["a", "\nU", "s is", "."], ["\nUser:"])
    assert (pieces, text.stopped) == (["a", "", "\nUs is", "."], False)
    pieces, text = shown(["a", "\nU"], ["\nUser:"])
    assert (pieces, text.stopped) == (["a", "\nU"], False), "the last token shows what was held back"


def test_the_earliest_of_several_stops_ends_the_text():
    assert shown(["x one two"], ["two", "one"])[1].text == "x "
    assert shown(["ends"], ["end", "ends"])[1].text == ""


def test_a_stop_inside_characters_of_several_tokens():
    tokenizer = tokenizers.load(SHIPPED)
    ids = tokenizer("a 🙂 b", add_special_tokens=False)["input_ids"]
    text, pieces = Detokenizer(tokenizer, ["🙂"]), []
    for token in ids:
        pieces.append(text.push(token, False))
        if text.stopped:
            break
    assert text.stopped and "".join(pieces) == text.text == tokenizer.decode(ids).partition("🙂")[0]


def test_doing_a_tokens_work_for_none_changes_nothing():
    text = Detokenizer(Letters("a", "b"), ["z"])
    text.push(0, False)
    text.again()
    assert (text.text, text.ids, text.stopped) == ("a", [0], False)


def test_stop_strings():
    assert check_stops(()) == check_stops(None) == ()
    assert check_stops("a") == ("a",) and check_stops(["a", "b"]) == ("a", "b")
    for wrong in ("", ["a", ""], [7]):
        with pytest.raises(UsageError, match="give a text that ends the answer, or several"):
            check_stops(wrong)
