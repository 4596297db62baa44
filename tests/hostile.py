"""What tests of hostile words share: sizes that no machine holds, and the demand for one line, at once.

``LARGE``: changes of a small model's configuration, and words of the error.
"""

import contextlib
import resource
import time

import pytest
from hf_models import BASE

SIZES = {"model_type": "llama", **BASE}


@contextlib.contextmanager
def quick(seconds=2.0, mebibytes=200):
    """Fails what takes longer, or holds more memory than that at once."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - started < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes << 10


@contextlib.contextmanager
def one_line(kind, match):
    with quick(), pytest.raises(kind, match=match) as caught:
        yield
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2010


LARGE = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a positive integer, 1024 at most"),
    ({"vocab_size": 2**31}, "vocab_size is 2147483648; it must be a positive integer, 4194304 at most"),
    ({"hidden_size": 2**17, "head_dim": 64, "num_hidden_layers": 2**10, "intermediate_size": 2**20}, "parameters"),
    ({"head_dim": 2**30}, "head_dim is 1073741824"),
    ({"num_attention_heads": 2**30, "num_key_value_heads": 1}, "num_attention_heads is"),
    ({"max_position_embeddings": 10**18}, "max_position_embeddings is"),
    ({"rope_scaling": {"type": "linear", "factor": 1e38}, "rope_theta": "x"}, "rope_theta is 'x'"),
    ({"vocab_size": "9" * 10**6}, "vocab_size is '999.*at most"),
    ({"eos_token_id": ["\x1b[2J" * 1000]}, "eos_token_id is"),
    ({"hidden_act": {"a": [1] * 10**5}}, "hidden_act is"),
    ({"\x1b[31mhead_scale": 2.0}, r"\\x1b\[31mhead_scale is 2.0; this field is not supported"),
]
