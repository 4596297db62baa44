"""Kernels in Triton, where there is no GPU, by its interpreter: each is its readable twin to the last bit.

Needs Triton (`pip install triton`), and is skipped with a word without it: `make test-cuda` is the same on a GPU. The
interpreter takes minutes, so all but a few calls are among the slow tests.
"""

import inspect
from functools import partial
from pathlib import Path

import interpreted
import kernel_cases
import pytest
from kernel_twins import both

from crypten_llm.kernels import cuda, ring
from crypten_llm.kernels.ring import Comparison, Group

needs_triton = pytest.mark.skipif(bool(interpreted.MISSING), reason=interpreted.MISSING)
KERNELS = [name for name in vars(ring.Kernels) if name[0] != "_" and name != "KeyStream"]
FOLDER = Path(cuda.__file__).parent


@pytest.fixture(scope="module")
def check():
    return partial(both, kernels=(interpreted.interpreter(),))


@needs_triton
def test_one_number(check):
    kernel_cases.limbs(check, 98, 1, 1)
    kernel_cases.lifted(check, 98, 1, 1)
    kernel_cases.ones(check, 104, 1)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 40, 63, 64])
def test_what_travels(check, bits):
    for count in (0, 1, 513):
        kernel_cases.travel(check, bits, count)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("bits", [65, 79, 128, 129, 192, 256, 300])
def test_limbs(check, bits):
    kernel_cases.limbs(check, bits, 3, 23)
    kernel_cases.lifted(check, bits, 3, 23)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "size"), [(0, 5), (1, 1), (2, 131), (1, 1100)])
def test_limbs_of_any_number(check, rows, size):
    kernel_cases.limbs(check, 98, rows, size)
    kernel_cases.lifted(check, 98, rows, size)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("q", [64, 65, 104, 128, 256, 300, 512])
def test_modulo_ones(check, q):
    kernel_cases.ones(check, q, 40)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 131, 1100])
def test_modulo_ones_of_any_number(check, count):
    kernel_cases.ones(check, 104, count)


@needs_triton
@pytest.mark.slow
def test_any_layout(check):
    kernel_cases.any_layout(check)


@needs_triton
@pytest.mark.slow
def test_waves(check):
    kernel_cases.waves(check, 29, 150)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 130])
def test_tables_and_places(check, count):
    kernel_cases.tables(check, count)


@needs_triton
@pytest.mark.slow
def test_rows_chosen_by_bits_and_a_field(check):
    kernel_cases.rows_and_fields(check)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("group", [Group.residues(256), Group(2, 88), Group(2, 20)], ids=str)
def test_comparison_keys(check, group):
    kernel_cases.keys(check, group, 3, Comparison(69, (0, 1 << 66), (64, 66), group))


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_a_program_of_triton_for_a_gpu(name):
    """In the module that is said to have it, with the same parameters; read, as Triton may be missing."""
    kernel = getattr(cuda, name)
    text = (FOLDER / f"{kernel.module}.py").read_text("utf-8")
    parameters = list(inspect.signature(kernel).parameters)
    (head,) = (part for part in text.split("\ndef ") if part.startswith(f"{name}("))
    given = head[head.index("(") + 1 : head.index(") ->")].replace("\n", " ")
    assert [part.split(":")[0].strip() for part in given.split(", ") if ":" in part] == parameters


def test_no_constant_is_made_whenever_a_kernel_is_called():
    """A copy from the processor could not be captured: those that are needed are made once (``lru_cache``)."""
    for path in FOLDER.glob("triton_*.py"):
        for part in path.read_text("utf-8").split("\n\n\n"):
            assert "torch.tensor(" not in part or "@lru_cache" in part, f"{path.name}: {part[:200]}"
