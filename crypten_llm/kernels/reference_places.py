"""Kernels to read: bits at secret places, and rows chosen by bits, in Python's integers (``kernels.reference``)."""

import torch
from torch import Tensor

from crypten_llm.kernels.integers import as_words, integers


def flip_places(places: Tensor, words: Tensor) -> Tensor:
    size = 8 * words.shape[1]
    for i, place in enumerate(integers(places)):
        byte, bit = divmod(place % size, 8)
        words[i, byte] = int(words[i, byte]) ^ 2**bit
    return words


def parities(words: Tensor, turns: Tensor, sets: Tensor) -> Tensor:
    many, size = sets.shape
    found = []
    for row, turn in zip(words.tolist(), integers(turns), strict=True):
        bits = [byte >> bit & 1 for byte in row for bit in range(8)]
        found += [sum(bits[p] for p in range(size) if chosen[(turn - p) % size]) % 2 for chosen in sets.tolist()]
    return as_words(found, (len(words), many))


def xor_rows(table: Tensor, chosen: Tensor) -> Tensor:
    rows, found = table.tolist(), []
    for words in chosen.tolist():
        total = [0] * table.shape[1]
        for v, row in enumerate(rows):
            if words[v // 64] >> v % 64 & 1:
                total = [sum_ ^ entry for sum_, entry in zip(total, row, strict=True)]
        found.append(total)
    return torch.tensor(found, dtype=torch.int32).reshape(len(found), table.shape[1])
