"""Sessions of one process beside and after each other: the end of one is nothing to the others."""

import pytest
from hf_models import tiny

from crypten_llm.errors import UsageError
from crypten_llm.session.api import PrivateLlama


def test_a_session_that_ends_leaves_the_one_on_crypten_alone(tmp_path):
    model = str(tiny(tmp_path, num_hidden_layers=1)[0])

    def session(engine):
        return PrivateLlama.from_pretrained(model, engine=engine, threads=1, timeout=60)

    def answer(llama):
        return llama.generate(input_ids=[5, 6], max_new_tokens=2).token_ids

    with PrivateLlama.from_pretrained(model, engine="plain") as plain:
        expected = answer(plain)
    wire, first = session("wire"), session("crypten")
    wire.close()
    assert answer(first) == expected
    first.close()
    with session("crypten") as second:
        first.close()  # twice is harmless, also to who came since
        with pytest.raises(UsageError, match="already has a private session"):
            session("crypten")
        assert answer(second) == expected
