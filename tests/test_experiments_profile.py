"""The profile of engine ``wire``: every part it counts is where it says."""

import importlib
import inspect
from pathlib import Path

import crypten_llm
from crypten_llm.kernels import cpu
from experiments.measure import profile_wire
from experiments.measure.profile_wire import PARTS, REST, part_of


def test_parts_are_files_and_functions_of_the_package():
    """Each file once, so that its name says which it is."""
    root = Path(crypten_llm.__file__).parent
    paths = [path.relative_to(root.parent) for path in root.rglob("*.py")]
    for part in PARTS:
        file, _, function = part.partition(" ")
        (path,) = (path for path in paths if path.name == file)
        if function:
            found = importlib.import_module(".".join(path.with_suffix("").parts))
            for name in function.split("."):
                found = getattr(found, name)
            assert inspect.isfunction(found) and found.__code__.co_qualname == function


def test_what_a_function_is_counted_as():
    codes = {cpu.matmul_nt: "products and openings", cpu.waves: "fits", cpu.KeyStream.fill: "key streams"}
    codes |= {cpu.compare: "comparisons", profile_wire.part_of: REST}
    assert {function: part_of(function.__code__) for function in codes} == codes
