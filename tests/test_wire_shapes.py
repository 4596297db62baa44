"""Shapes without contents: as torch works them out."""

import pytest
import torch

from crypten_llm.protocols.dealer.shapes import Shape, shape_only

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
    "shift right": lambda x, y: y >> 3,
    "shapes of one size": lambda x, y: x * x,
    "reshape": lambda x, y: x.reshape(3, -1),
    "view of a tuple": lambda x, y: x.view((15, 4)),
    "permute": lambda x, y: x.permute(2, 0, 1),
    "transpose": lambda x, y: x.transpose(-1, 0),
    "expand": lambda x, y: y.expand(5, -1, 4),
    "index": lambda x, y: x[:, None, 1:, ..., :2],
    "index by a tensor": lambda x, y: x[:, torch.tensor([2, 0, 0, 1])],
    "index by a tensor alone": lambda x, y: x[torch.tensor([4])],
    "index by no element": lambda x, y: x[:, :2, torch.tensor([], dtype=torch.int64)],
    "index by a tensor after an ellipsis": lambda x, y: x[..., torch.tensor([2, 0, 0, 1, 1]), 1:],
    "index by a tensor before an ellipsis": lambda x, y: x[1, torch.tensor([2, 0]), ..., None],
    "index by a tensor and a number": lambda x, y: x[..., torch.tensor([2, 0]), 1],
    "unbind": lambda x, y: x.unbind(-1)[1],
    "new zeros": lambda x, y: x.new_zeros(2, 3) if isinstance(x, torch.Tensor) else x.new_zeros((2, 3)),
    "new full": lambda x, y: x.new_full((2, 3), 7),
    "all together": lambda x, y: x[:, :1].permute(1, 0, 2).expand(1, 5, 4).reshape(-1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_as_torch_works_it_out(name):
    operation, sizes = OPERATIONS[name], [(5, 3, 4), (3, 4)]
    expected = operation(*(torch.ones(size, dtype=torch.int64) for size in sizes))
    made = operation(*map(shape_only, sizes))
    assert isinstance(made, Shape) and made.is_meta and made.shape == expected.shape and made.dtype == expected.dtype


def test_what_is_not_known_is_refused():
    with pytest.raises(AssertionError, match="add it to crypten_llm.protocols.dealer.shapes"):
        torch.stack([shape_only((2,)), shape_only((2,))])
    with pytest.raises(AssertionError, match="does not reshape"):
        shape_only((2, 3)).reshape(4, -1)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        shape_only((2, 3)) + shape_only((2, 4))
