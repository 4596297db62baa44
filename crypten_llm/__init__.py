"""Private Llama inference: a client's prompt and an owner's weights meet under secure multi-party computation."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["PrivateLlama"]


def __getattr__(name: str) -> Any:
    if name == "PrivateLlama":  # imports torch and CrypTen, which takes seconds
        from crypten_llm.session.api import PrivateLlama

        return PrivateLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
