"""Graphs on a machine without a GPU: what is computed is recorded, and computed again from and to the same tensors.

What a GPU's graph would read from an address is read from the tensor that was there; a number of the processor that
found its way into the program is what it was when the program was recorded, as in a graph. Recorded are torch's
operations, and the processor's kernels, which are none (``RecordedKernels``).
"""

from contextlib import contextmanager
from functools import partial
from threading import local

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from crypten_llm.kernels import cpu

NUMBER = torch.ops.aten._local_scalar_dense.default
EMPTY = ("aten::empty", "aten::new_empty")  # memory that stays where it is, with what is in it
_now = local()  # the recording of this thread, each of which is a role


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def is_captured():
    """Whether this thread's kernels are."""
    return getattr(_now, "recording", None) is not None


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not NUMBER, "a number is asked for while kernels are captured"
        if func._schema.is_mutable:
            self.keep(args[0])
        out = func(*args, **(kwargs or {}))
        if not func.name().startswith(EMPTY):
            self.calls.append((partial(func, *args, **(kwargs or {})), out))
        return out

    def keep(self, tensor):
        memory = tensor.untyped_storage()
        self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))

    def undo(self):
        """As if nothing had been computed: whoever captures has only said what is to be."""
        for memory, content in self.before.values():
            memory.copy_(content)


def _again(function, out):
    for old, new in zip(tensors(out), tensors(function()), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


class RecordedGraphs:
    """As ``kernels.graphs.Graphs``. launches: of all there are."""

    launches = 0

    def __init__(self, device):
        pass

    @contextmanager
    def apart(self):
        yield

    def begin(self):
        _now.recording = _Recording()
        _now.recording.__enter__()

    def end(self):
        recording, _now.recording = _now.recording, None
        recording.__exit__(None, None, None)
        recording.undo()

        def launch():
            RecordedGraphs.launches += 1
            for call in recording.calls:
                _again(*call)

        return launch

    def abandon(self):
        if is_captured():
            self.end()

    def has_room(self, count):
        self._asked = not getattr(self, "_asked", False)
        return self._asked  # every other time there is none, and it is made

    def make_room(self, count):
        assert not is_captured(), "memory is made while kernels are captured"

    def sent(self, message):
        return message

    def arrived(self, message):
        return message

    def wait(self):
        pass


def _recorded(function, *given):
    """The result of a function that is none of torch's operations, and may write to what it is given."""
    recording = getattr(_now, "recording", None)
    if recording is None:
        return function(*given)
    with _disable_current_modes():
        for tensor in tensors(given):
            recording.keep(tensor)
        out = function(*given)
    recording.calls.append((partial(function, *given), out))
    return out


class RecordedKernels:
    """The processor's kernels, and key streams that read their key when they run."""

    def __getattr__(self, name):
        kernel = getattr(cpu, name)
        return partial(_recorded, kernel)

    class KeyStream:
        def __init__(self, key):
            self._key, self.place = torch.frombuffer(bytearray(key), dtype=torch.uint8), 0

        def take_key(self, other):
            self._key.copy_(other._key)

        def fill(self, count, over=None):
            place, self.place = self.place, self.place + count
            made = _recorded(self._at, place, count)
            return made if over is None else made ^ over

        def _at(self, place, count):
            stream = cpu.KeyStream(bytes(self._key.tolist()))
            return stream.fill(place + count)[place:]
