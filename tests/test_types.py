"""What a type checker cannot see of engines: operations that come from a table, and those that policies ask for."""

import inspect

import pytest

from crypten_llm.engines.base import Engine
from crypten_llm.engines.crypten.engine import CryptenEngine
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.counted import CostEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.insecure.compare import CompareEngine
from crypten_llm.insecure.tracked import TrackedEngine
from eviction.operations import Operations

ENGINES = [PlainEngine, CryptenEngine, WireEngine, CostEngine, TrackedEngine, CompareEngine]


def operations(contract: type) -> dict[str, inspect.Signature]:
    """The methods that a class of operations declares itself."""
    return {
        name: inspect.signature(method)
        for name, method in vars(contract).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def accepts(method, wanted: inspect.Signature) -> bool:
    """Whether what the contract's arguments are can be given to the method, in the same places."""
    count = len(wanted.parameters)
    least = sum(parameter.default is parameter.empty for parameter in wanted.parameters.values())
    signature = inspect.signature(method)
    try:
        for given in (least, count):
            signature.bind(*range(given))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("contract", [Engine, Operations], ids=lambda contract: contract.__name__)
def test_every_engine_has_every_operation(engine, contract):
    """Of the model, and of the policies: under its name, and with the same arguments."""
    wanted = operations(contract)
    assert len(wanted) > 15
    missing = [name for name in wanted if not hasattr(engine, name)]
    other = [name for name in wanted if name not in missing and not accepts(getattr(engine, name), wanted[name])]
    assert (missing, other) == ([], [])


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_engines_are_complete(engine):
    assert not inspect.isabstract(engine)


def test_python_refuses_an_engine_that_lacks_an_operation():
    made = {name: getattr(PlainEngine, name) for name in Engine.__abstractmethods__ - {"swiglu"}}
    with pytest.raises(TypeError, match="swiglu"):
        type("Lacking", (Engine,), made)()


def test_a_missing_operation_is_found():
    wanted = operations(Operations)
    assert accepts(lambda self, x, y: x, wanted["add"])
    assert not accepts(lambda self, x: x, wanted["add"])
    assert not accepts(lambda self, scores: scores, wanted["softmax"])
