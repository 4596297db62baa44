"""The format of a frame: its header, its kinds, and the types that travel.

A frame is a 24-byte header and a payload of raw little-endian elements, UTF-8 JSON or one line of text. The receiver
knows what must come next and compares kind, dtype, sequence number and size before it allocates anything. No pickle is
ever read. Owns the numbers that both ends of a link must agree on; `greeting.PROTOCOL_VERSION` changes with them.
"""

import struct
import sys
from collections.abc import Iterable

import torch

HEADER = struct.Struct("<2sBBIQQ")  # magic, kind, dtype, sequence number, payload bytes, send time (emulation)
MAGIC = b"cL"
TENSOR, JSON, ABORT, STREAM, BEAT = 1, 2, 3, 4, 5
KIND_NAMES = {TENSOR: "tensor", JSON: "JSON", ABORT: "abort", STREAM: "stream", BEAT: "heartbeat"}
BOUNDED = (JSON, STREAM)  # of a length that the receiver knows only a bound of
MIXED = 0  # dtype code of a frame that carries tensors of several dtypes, and of frames without tensors
DTYPES = {
    torch.int64: 1,
    torch.int32: 2,
    torch.int16: 3,
    torch.uint8: 4,
    torch.float32: 5,
    torch.bool: 6,
}
DTYPE_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()} | {MIXED: "mixed"}
MAX_ABORT_BYTES = 4096
if sys.byteorder != "little":
    raise ImportError("frames carry raw little-endian elements, and this machine's are big-endian")


def dtype_code(dtypes: Iterable[torch.dtype]) -> int:
    """The code of what a frame carries. Raises TypeError for what does not travel."""
    codes = {DTYPES.get(dtype, MIXED) for dtype in dtypes}
    if MIXED in codes:
        raise TypeError(f"{dtypes} do not travel: convert to one of {', '.join(map(str, DTYPES))}")
    return codes.pop() if len(codes) == 1 else MIXED
