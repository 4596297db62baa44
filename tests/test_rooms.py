"""What each room may know: protocols nothing of a device, kernels nothing of a role, and roles are told apart once."""

import ast
from pathlib import Path

import pytest

import crypten_llm

ROOT = Path(crypten_llm.__file__).parent
PROTOCOLS = sorted((ROOT / "protocols").rglob("*.py"))
DEVICES = {"numpy", "numba", "llvmlite", "cryptography", "OpenSSL", "ssl"}
READ = {"role", "rank", "is_dealer", "is_owner", "is_client"}  # attributes
NAMED = {"OWNER", "CLIENT", "DEALER", "role", "rank", "party"}
CLASSES = {"Owner", "Client", "Dealer", "Party", "Counting"}

# Where a role or a rank is read outside the dealer's room, by what the innermost function does with it.
ROLES_READ = {
    ("protocols/ladder.py", "below", "runtime.role"),  # a comparison key is evaluated for one of two parties
    ("protocols/selection.py", "by_pairs", "torch.arange(1 << rank.width) < count"),  # a value's rank, no party's
    ("engines/wire/engine.py", "__init__", "transport.rank"),  # every engine says which rank it is
}

COUNTERS = "engines/wire/counted.py"  # counts for both parties, which are not there: by party, not by its own role


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Modules, by their whole names: of ``from a import b`` both a and a.b, as b may be a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_devices(source: str) -> list[str]:
    """What a protocol may not say: modules of a device, by import or by a call, and tensors taken out of torch."""
    tree = ast.parse(source)
    found = [name for name in imports(tree) if name.split(".")[0] in DEVICES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("numpy", "__array__", "data_ptr"):
            found.append(f".{node.attr}")
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # __import__, import_module
            found.append(ast.unparse(node))
    return found


def of_roles(source: str) -> list[tuple[str, str]]:
    """(innermost function, expression) wherever a role or a rank is read, compared, branched on, or selects."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = node.name
        if isinstance(node, ast.Attribute) and node.attr in READ and isinstance(node.ctx, ast.Load):
            found.append((function, ast.unparse(node)))
        for decides in deciding(node):
            if {part.id for part in ast.walk(decides) if isinstance(part, ast.Name)} & NAMED:
                found.append((function, ast.unparse(node).partition("\n")[0]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            kinds = {part for part in ast.walk(node.args[1]) if isinstance(part, ast.Name | ast.Attribute)}
            if {getattr(kind, "id", getattr(kind, "attr", "")) for kind in kinds} & CLASSES:
                found.append((function, ast.unparse(node)))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def deciding(node) -> list[ast.AST]:
    """The parts of an expression or a statement that decide what it gives."""
    if isinstance(node, ast.Compare):
        return [node]
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return [] if isinstance(node.test, ast.Compare) else [node.test]
    if isinstance(node, ast.Match):
        return [node.subject]
    return [node.slice] if isinstance(node, ast.Subscript) else []


@pytest.mark.parametrize("path", PROTOCOLS, ids=name_of)
def test_protocols_know_no_device(path):
    assert of_devices(path.read_text("utf-8")) == []


def test_protocols_know_of_kernels_the_list_alone():
    """And what a device has beside arithmetic: graphs of what was launched, memory that another card writes to."""
    beside, found = ("ring", "graphs", "mailbox", "opened", "pipe"), set()
    for path in PROTOCOLS:
        names = {
            name for name in imports(ast.parse(path.read_text("utf-8"))) if name.startswith("crypten_llm.kernels.")
        }
        found |= {(name_of(path), name) for name in names if name.split(".")[2] not in beside}
    assert not found


def test_kernels_know_no_role():
    """And nothing of the project but each other."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        names = {name for name in imports(ast.parse(path.read_text("utf-8"))) if name.split(".")[0] == "crypten_llm"}
        assert all(name.startswith("crypten_llm.kernels") for name in names), f"{name_of(path)}: {sorted(names)}"


def test_roles_are_told_apart_in_the_dealers_room_alone():
    found = set()
    for path in [*PROTOCOLS, *sorted((ROOT / "engines" / "wire").rglob("*.py"))]:
        if not name_of(path).startswith("protocols/dealer/") and name_of(path) != COUNTERS:
            found |= {(name_of(path), *read) for read in of_roles(path.read_text("utf-8"))}
    assert found == ROLES_READ


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np",
        "from numba import njit",
        "from cryptography.hazmat.primitives import ciphers",
        "def f(x):\n    return x.numpy()",
        "g = x.numpy",
        "np = __import__('numpy')",
        "import importlib\nnp = importlib.import_module('numpy')",
    ],
)
def test_what_a_protocol_may_not_say_is_found(source):
    assert of_devices(source)


@pytest.mark.parametrize(
    "source",
    [
        "def f(runtime):\n    return runtime.role == 0",
        "def f(runtime):\n    return 1 if runtime.is_dealer else 0",
        "def f(rank):\n    return rank == 0",
        "def f(x):\n    return x in (OWNER, CLIENT)",
        "def f(role):\n    match role:\n        case 0:\n            pass",
        "def f(rank):\n    return 1 if rank else 0",
        "def f(rank):\n    if not rank:\n        return 0",
        "def f(party):\n    return [0, 1][party]",
        "def f(runtime):\n    return isinstance(runtime, Dealer)",
        "def f(runtime):\n    return isinstance(runtime, roles.Owner)",
    ],
)
def test_a_role_that_is_told_apart_is_found(source):
    assert {function for function, _ in of_roles(source)} == {"f"}


def test_packages_of_the_endpoint_are_used_in_its_room_alone():
    """So that every other command starts without them."""
    served = {"starlette", "uvicorn", "prometheus_client"}
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        if used := {name.split(".")[0] for name in imports(ast.parse(path.read_text("utf-8")))} & served:
            found[name_of(path)] = used
    assert found and {name.split("/")[0] for name in found} == {"serving"}
    assert set().union(*found.values()) == served
