"""A policy's trained weights at each party: read from a file that its own user named, before anybody else is heard."""

from pathlib import Path

import eviction
from crypten_llm import files, limits
from crypten_llm.errors import UsageError


def know_weights(path: str) -> None:
    """Makes a policy's trained weights known to this process by the file's name; nothing for "".

    Raises UsageError for a file that cannot be read.
    """
    if path:
        try:
            eviction.register(Path(path).name.removesuffix(".safetensors"), files.read(path, limits.POLICY_BYTES))
        except eviction.PolicyError as error:
            raise UsageError(f"--policy-weights {path}: {error}") from None
