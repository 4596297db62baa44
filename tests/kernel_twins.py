"""A kernel beside its readable twin, and what both are given.

Owns the comparison of devices. ``both`` calls a kernel and its twin in ``reference``. Every time it also shows that
what the kernel was given is left as it was, that the result has memory of its own, and that nothing of what was in that
memory before is left in it. Kernels of device cuda are called with tensors of the processor, for which they have
torch's own operations. A device of one's own goes through the same tests: give ``both`` its module.
"""

import copy
import inspect
import itertools
import math
import random

import numpy as np
import pytest
import torch

from crypten_llm.kernels import cpu, cuda, reference, ring
from crypten_llm.kernels.integers import wide

EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, 0x0123456789ABCDEF]
OVERWRITTEN = dict.fromkeys(  # by what says so
    ("turn_table", "turn_signs", "turn_bits", "flip_places", "turned_exponents", "read_exponents"), "words"
)


def words(*shape, seed=0, bound=2**63):
    """Uniform words with the edges in front."""
    x = torch.randint(-bound, bound - 1, shape, generator=torch.Generator().manual_seed(seed))
    edges = torch.tensor([edge for edge in EDGES if -bound <= edge < bound])[: x.numel()]
    x.view(-1)[: len(edges)] = edges
    return x


def table_words(bits, *shape, seed=0):
    """Uniform words of a table of that width, and the ends of their range."""
    dtype = ring.TABLE_WORDS[bits]
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    x = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x.view(-1)[:2] = torch.tensor([low, high], dtype=dtype)[: x.numel()]
    return x


def layouts(make, *shape):
    """What ``make`` makes of a shape, as it is, transposed, as every other element, and repeated without a copy."""
    *lead, last = shape
    order = range(len(shape))[::-1]
    return [
        make(*shape),
        make(*shape[::-1]).permute(*order),
        make(*lead, 2 * last)[..., ::2],
        make(*lead, 1).expand(*shape),
    ]


# Numbers in limbs.


def wide_edges(bits: int) -> list[int]:
    """Zero, one, everything set, carries that run through all limbs and stop at the last one, the top bit."""
    full = 2**bits - 1
    limb = [2**64 - 1, 2**64] if bits > 64 else []
    return [0, full, 1, full - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, full ^ 1, *limb, full // 3, 2**32 - 1]


def wide_words(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform limbs, edges in front, in an order that the seed says."""
    generator = random.Random(f"{bits} {seed}")
    front = wide_edges(bits)
    generator.shuffle(front)
    count = math.prod(shape)
    return wide((front + [generator.getrandbits(bits) for _ in range(count)])[:count], bits, shape)


def wide_layouts(bits: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Limbs of a shape as they come, limbs lying apart, leading dimensions turned, in the middle of more, repeated."""
    count = ring.limbs(bits)
    made = wide_words(bits, *shape, seed=seed)
    apart = torch.full((*shape, 2 * count), -1)
    apart[..., ::2] = made
    reverse = [*range(len(shape))[::-1], len(shape)]
    middle = wide_words(bits, shape[0] + 2, *shape[1:], seed=seed)[1:-1]
    return [
        made,
        apart[..., ::2],
        wide_words(bits, *shape[::-1], seed=seed).permute(*reverse),
        middle,
        wide_words(bits, *shape[:-1], 1, seed=seed).expand(*shape, count),
    ]


def wide_pairs(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every edge beside every edge."""
    left, right = zip(*itertools.product(wide_edges(bits), repeat=2), strict=True)
    return wide(left, bits, (len(left),)), wide(right, bits, (len(right),))


# A kernel and its twin.


def poison(patched, byte: int) -> None:
    """Fills memory with ``byte`` that numpy and torch give out as it comes."""

    def filled(make, view):
        def empty(*arguments, **options):
            made = make(*arguments, **options)
            view(made.reshape(-1))[:] = byte
            return made

        return empty

    patched.setattr(np, "empty", filled(np.empty, lambda flat: flat.view(np.uint8)))
    patched.setattr(torch, "empty", filled(torch.empty, lambda flat: flat.view(torch.uint8)))


def tensors(value) -> list:
    """The tensors of an argument or a result, and ``None`` where one is left out."""
    if isinstance(value, (tuple, list)):
        return [part for each in value for part in tensors(each)]
    return [value] if value is None or torch.is_tensor(value) else []


def same(found, expected) -> bool:
    if found is None or expected is None:
        return found is expected
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(found, expected)


def memory(tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def called(kernels, name, arguments):
    """The result, from copies of the arguments."""
    given = copy.deepcopy(arguments)  # strides and all
    result = getattr(kernels, name)(*given)
    parameters = list(inspect.signature(getattr(ring.Kernels, name)).parameters)[1:]
    for parameter, before, after in zip(parameters, arguments, given, strict=False):
        if parameter == OVERWRITTEN.get(name):
            assert result is after, f"{name} returns the {parameter} that it overwrote"
            continue
        assert all(map(same, tensors(after), tensors(before))), f"{name} changed its {parameter}"
        if name != "unpack":  # whose result may be the data's memory, and says so
            shared = {memory(tensor) for tensor in tensors(result) if tensor is not None} - {0}
            assert not shared & {memory(tensor) for tensor in tensors(after)}, f"{name} returns its {parameter}"
    return result


def both(name, *arguments, kernels=(cpu, cuda)):
    """The result of ``reference``, which ``kernels`` give too, whatever was in their memory before."""
    expected = called(reference, name, arguments)
    for module in kernels:
        found = [called(module, name, arguments)] if module is cpu else []  # compiled before memory is poisoned
        for byte in (0x5A, 0xFF) if module is not cuda else (0x5A,):
            with pytest.MonkeyPatch.context() as patched:
                poison(patched, byte)
                found.append(called(module, name, arguments))
        for result in found:
            pairs = zip(tensors(result), tensors(expected), strict=True)
            assert all(same(*pair) for pair in pairs), f"{name} differs from its twin"
    return expected
