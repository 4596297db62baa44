"""Graphs on a machine without a GPU: torch's operations are recorded, and run again on the same tensors.

What a GPU's graph would read from an address is read from the tensor that was there; a number of the processor that
found its way into the program is what it was when the program was recorded, as in a graph.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUMBER = torch.ops.aten._local_scalar_dense.default
EMPTY = ("aten::empty", "aten::new_empty")


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not NUMBER, "a number is asked for while kernels are captured"
        if func._schema.is_mutable:
            memory = args[0].untyped_storage()
            self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        out = func(*args, **kwargs)
        if not func.name().startswith(EMPTY):  # memory that stays where it is, with what is in it
            self.calls.append((func, args, kwargs, out))
        return out

    def undo(self):
        """As if nothing had been computed: whoever captures has only said what is to be."""
        for memory, content in self.before.values():
            memory.copy_(content)


def _again(func, args, kwargs, out):
    made = func(*args, **kwargs)
    for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


class RecordedGraphs:
    """As ``kernels.graphs.Graphs``. launches: of all there are."""

    launches = 0

    def __init__(self, device):
        self._recording = None

    @contextmanager
    def apart(self):
        yield

    def begin(self):
        self._recording = _Recording()
        self._recording.__enter__()

    def end(self):
        recording, self._recording = self._recording, None
        recording.__exit__(None, None, None)
        recording.undo()

        def launch():
            RecordedGraphs.launches += 1
            for call in recording.calls:
                _again(*call)

        return launch

    def make_room(self, count):
        return True

    def sent(self, message):
        return message

    def arrived(self, message):
        return message

    def wait(self):
        pass

    def abandon(self):
        if self._recording is not None:
            self.end()
