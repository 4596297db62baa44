"""Key streams: those of every device are OpenSSL's, byte by byte, at RFC 8439's vectors and where a counter ends."""

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from kernel_twins import poison, same

from crypten_llm.kernels import cpu, cuda, reference


@pytest.mark.parametrize("byte", [0x00, 0x5A, 0xFF])
def test_key_streams(byte, monkeypatch):
    """Pieces of any size, one behind the other, as one call into OpenSSL gives them; in memory that may be written."""
    monkeypatch.setattr(cpu, "_CHUNK", 1 << 12)  # several calls a piece
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    theirs, *mine = (kernels.KeyStream(bytes(range(32))) for kernels in (reference, cpu, cuda))
    poison(monkeypatch, byte)
    for count in (0, 1, 15, 16, 17, 5, 64, (1 << 12) - 1, 1 << 12, (1 << 14) + 3, 64):
        expected, over = theirs.fill(count), torch.randint(0, 256, (count,), dtype=torch.uint8)
        covered = theirs.fill(count, over)
        for stream in mine:
            found = stream.fill(count)
            assert same(found, expected) and found.numel() == count
            assert same(stream.fill(count, over), covered)
            found.fill_(byte)  # changes nothing of what comes


def test_key_streams_in_pieces_as_large_as_they_come(monkeypatch):
    count = cpu._CHUNK + 21
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    expected = reference.KeyStream(bytes(32)).fill(count)
    assert all(same(kernels.KeyStream(bytes(32)).fill(count), expected) for kernels in (cpu, cuda))


def test_a_key_stream_goes_on_where_the_lower_half_of_its_counter_ends(monkeypatch):
    """OpenSSL's ends after 2^32 blocks: there is one for each word of the upper half. Here the other way, from it."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    end, key = 1 << 38, bytes(range(32))
    found = []
    for kernels in (cpu, cuda):
        stream = kernels.KeyStream(key)
        if kernels is cpu:
            stream._position = end - 128
            stream._start()
        else:
            stream.place = end - 128
        found.append(torch.cat([stream.fill(100), stream.fill(28), stream.fill(7), stream.fill(200)]))
    assert same(*found)
    upper = bytes([0, 0, 0, 0, 1, 0, 0, 0]) + bytes(8)  # of the counter, then the nonce
    after = Cipher(algorithms.ChaCha20(key, upper), None).encryptor().update(bytes(207))
    assert bytes(found[0][128:].tolist()) == after
    assert bytes(found[0][128:192].tolist()) != bytes(cpu.KeyStream(key).fill(64).tolist())


RFC = [  # key, the counter's lower half, block: RFC 8439, appendix A.1, its vectors of nonce 0
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\1",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\0\xff" + bytes(30),
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
]


@pytest.mark.parametrize(("key", "counter", "block"), RFC)
def test_blocks_of_key_streams_are_published_ones(key, counter, block, monkeypatch):
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    for kernels in (cpu, cuda, reference):
        stream = kernels.KeyStream(key)
        stream.fill(64 * counter)
        assert bytes(stream.fill(64).tolist()).hex() == block
