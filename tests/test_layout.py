"""The house: no file too long to read at once, no circle of imports, and no room that knows those above it.

Imports at the top of a module count, but for those of types alone (``if TYPE_CHECKING``). Of what a function imports
when it runs, that which looks up is listed in ``LATER``.
"""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

import crypten_llm

ROOT = Path(crypten_llm.__file__).parents[1]
LONGEST = 400  # lines

# From the ground up; a room may know those on lower floors, and not another on its own.
FLOORS = (
    {
        "crypten_llm",
        "roles",
        "errors",
        "compat",
        "units",
        "records",
        "limits",
        "files",
        "memory",
        "precisions",
        "process",
        "program",
    }
    | {"devices", "eviction"},  # the first is the package's own __init__
    {"kernels", "links", "models"},
    {"protocols"},
    {"engines"},
    {"session"},
    {"insecure", "serving"},
    {"commands"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SHARED = FLOORS[0]  # single modules, of which one may know another

# What a function imports from a floor that is not below its own, and why.
LATER = {
    "crypten_llm imports crypten_llm.session.api": "PrivateLlama is offered by the package, whose import costs nothing",
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for package in ("crypten_llm", "eviction") for path in (ROOT / package).rglob("*.py")}


def room(name: str) -> str:
    """The folder of ``crypten_llm`` that a module is in, or the module; ``eviction`` is one room."""
    parts = name.split(".")
    return parts[1] if parts[0] == "crypten_llm" and len(parts) > 1 else parts[0]


def imports(tree: ast.AST, known=MODULES) -> tuple[set[str], set[str]]:
    """The modules among ``known`` that are imported at the top, and those that functions import."""
    top, later = set(), set()

    def visit(node, found):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in names]
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        else:
            inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, later if inner else found)
            return
        found.update(name for name in names if name in known)

    visit(tree, top)
    return top, later


@cache
def all_imports() -> dict[str, tuple[set[str], set[str]]]:
    """Of every module; read once, by the worker whose tests these are."""
    return {name: imports(ast.parse(path.read_text("utf-8"))) for name, path in MODULES.items()}


def all_at_the_top() -> dict[str, set[str]]:
    return {name: top - {name} for name, (top, _) in all_imports().items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room that is not on a lower floor."""
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if room(name) != room(other)
        and FLOOR[room(other)] >= FLOOR[room(name)]
        and not {room(name), room(other)} <= SHARED
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", ["crypten_llm", "eviction", "experiments", "tests"])
def test_no_file_is_too_long(package):
    lines = {module(path): len(path.read_text("utf-8").splitlines()) for path in (ROOT / package).rglob("*.py")}
    assert lines
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_no_circle_of_imports():
    assert circle(all_at_the_top()) == []


def test_every_room_has_its_floor():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_import_looks_up():
    assert upward(all_at_the_top()) == []


def test_eviction_knows_nothing_of_the_program_that_runs_it():
    known = {name: top | later for name, (top, later) in all_imports().items() if room(name) == "eviction"}
    assert any(known.values())
    assert [(name, other) for name in known for other in known[name] if room(other) != "eviction"] == []


def test_what_functions_import_when_they_run():
    assert set(upward({name: later for name, (_, later) in all_imports().items()})) == set(LATER)


def test_a_circle_and_a_look_up_would_be_found():
    """The finders on texts of their own."""
    known = {"crypten_llm.kernels.a", "crypten_llm.session.b", "crypten_llm.roles"}
    code = """
from crypten_llm.session import b
if TYPE_CHECKING:
    import crypten_llm.kernels.a
if b:
    import crypten_llm.roles
def f():
    from torch import nn
    from crypten_llm.kernels.a import x
    """
    assert imports(ast.parse(code), known) == (
        {"crypten_llm.session.b", "crypten_llm.roles"},
        {"crypten_llm.kernels.a"},
    )
    graph = {"crypten_llm.kernels.a": {"crypten_llm.session.b"}, "crypten_llm.session.b": {"crypten_llm.kernels.a"}}
    assert set(circle(graph)) == set(graph)
    assert upward(graph) == ["crypten_llm.kernels.a imports crypten_llm.session.b"]
    beside = {
        "crypten_llm.links.a": {"crypten_llm.kernels.b", "crypten_llm.errors"},
        "crypten_llm.errors": {"eviction"},
    }
    assert upward(beside) == ["crypten_llm.links.a imports crypten_llm.kernels.b"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
