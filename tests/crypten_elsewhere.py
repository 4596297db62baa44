"""CrypTen's path on a GPU, on a machine that has none: its own tensors for one around a processor's.

Owns what is put in the place of a GPU. All of CrypTen's code for one runs, its products of doubles too.
"""

from crypten.cuda import CUDALongTensor

from crypten_llm.engines.crypten import bridge


def put_in_place() -> None:
    """From now on every tensor of shares in this process is CrypTen's own for a GPU."""
    CUDALongTensor.__init__ = _of_a_processor
    CUDALongTensor.is_cuda = True
    bridge.wrapped = CUDALongTensor


def _of_a_processor(self, data=None, device=None):
    self._tensor = data if data is None else bridge.bare(data).long()
