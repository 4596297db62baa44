"""What the owner asks CrypTen's dealer for: shapes that fit together and into the machine, or one line."""

import pytest

from crypten_llm import memory
from crypten_llm.engines.crypten import bridge
from crypten_llm.errors import PartyError


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"function": "eval"}, "Invalid enum value 'eval'"),
        ({"function": "square", "args": "a"}, "Expected `array`, got `str`"),
        ({"function": "square", "args": [["a"]]}, "Expected `int`, got `str`"),
        ({"function": "square", "args": [[-1]]}, "Expected `int` >= 0"),
        ({"function": "square", "args": [[2**43]]}, "Expected `int` <="),
        ({"function": "square", "args": []}, "asked the dealer for square of []"),
        ({"function": "square", "args": [[2**42]]}, "the correlation needs 35184.4 GB of memory"),
        ({"function": "additive", "args": [[2], [3], "mul"]}, "asked the dealer for additive of"),
        ({"function": "additive", "args": [[2, 3], [3]]}, "asked the dealer for additive of"),
        ({"function": "additive", "args": [[2], [3], "matmul"]}, "asked the dealer for additive of"),
        ({"function": "additive", "args": [[2, 3], [4, 5], "matmul"]}, "asked the dealer for additive of"),
        ({"function": "binary", "args": [[2], "mul"]}, "asked the dealer for binary of"),
        ({"function": "wraps", "args": ["mul"]}, "asked the dealer for wraps of"),
        ({"function": "square", "args": [[2], [2]]}, "asked the dealer for square of"),
        ({"function": "additive", "args": [[2], "mul", "mul"]}, "asked the dealer for additive of"),
        (["stop"], "Expected `object`, got `array`"),
    ],
)
def test_a_request_that_makes_no_sense(mesh, monkeypatch, asked, words):
    owner, dealer = mesh()
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    served = bridge.Dealer(dealer, compute_parties=1)
    owner.send_json(1, asked)
    with pytest.raises(PartyError) as caught:
        served.serve()
    assert words in str(caught.value) and "rank 0 (owner)" in str(caught.value)
