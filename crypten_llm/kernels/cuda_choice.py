"""Which implementation a tensor goes to: Triton's on a GPU, torch's own operations elsewhere (see ``kernels.cuda``)."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar, cast

Kernel = TypeVar("Kernel", bound=Callable)


def triton(name: str) -> Any:
    """A module of Triton's programs, which is imported when a tensor on a GPU comes for the first time."""
    try:
        return import_module(f"crypten_llm.kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("device cuda needs Triton, which torch for CUDA brings: pip install triton") from error


def hot(module: str, place: int = 0) -> Callable[[Kernel], Kernel]:
    """A function in torch's operations that a module has in Triton too: where the argument at ``place`` is on a GPU.
    Its ``module`` says which.
    """

    def decorate(in_torch: Kernel) -> Kernel:
        @wraps(in_torch)
        def kernel(*given: Any) -> Any:
            chosen = getattr(triton(module), in_torch.__name__) if given[place].is_cuda else in_torch
            return chosen(*given)

        cast(Any, kernel).module = module
        return cast(Kernel, kernel)

    return decorate
