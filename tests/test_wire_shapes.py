"""Shapes without contents: as torch works them out."""

import pytest
import torch

from crypten_llm.protocols.dealer.shapes import RULES, Shape, shape_only

OPERATIONS = {
    "add": lambda x, y: x + y,
    "add a number": lambda x, y: 3 + x,
    "subtract": lambda x, y: x - y,
    "subtract from a number": lambda x, y: 1 - y,
    "multiply": lambda x, y: x * y,
    "negate": lambda x, y: -x,
    "mask": lambda x, y: x & 7,
    "shift": lambda x, y: y << 3,
    "cumulative sum": lambda x, y: y.cumsum(-1),
    "sum": lambda x, y: y.sum(-1),
    "sum of the first": lambda x, y: x.sum(0),
    "sum that stays": lambda x, y: x.sum(-1, keepdim=True),
    "join": lambda x, y: torch.cat([y, y[..., :2]], -1),
    "join along the first": lambda x, y: torch.cat([x, x], 0),
    "left to torch": lambda x, y: x[:, :1].permute(1, 0, 2).expand(1, 5, 4).reshape(-1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_as_torch_works_it_out(name):
    operation, sizes = OPERATIONS[name], [(5, 3, 4), (3, 4)]
    expected = operation(*(torch.ones(size, dtype=torch.int64) for size in sizes))
    made = operation(*map(shape_only, sizes))
    assert isinstance(made, Shape) and made.is_meta and made.shape == expected.shape and made.dtype == expected.dtype


def test_every_rule_is_tested(monkeypatch):
    used = set()
    for function, rule in RULES.items():

        def noting(*arguments, function=function, rule=rule, **options):
            used.add(function)
            return rule(*arguments, **options)

        monkeypatch.setitem(RULES, function, noting)
    for operation in OPERATIONS.values():
        operation(shape_only((5, 3, 4)), shape_only((3, 4)))
    assert used == set(RULES)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        shape_only((2, 3)) + shape_only((2, 4))
