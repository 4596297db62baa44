"""Which program this is: a digest of its code, by which parties and tapes recognise each other's.

It tells parties that run different code by mistake. It proves nothing of a party that lies about its own.
"""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import crypten_llm

_PACKAGES = ("crypten_llm", "eviction")
_PARTS = ("*.py", "*.json", "weights/*.safetensors")  # the last are of trained policies


@cache
def digest() -> str:
    """SHA-256 of the sources of both packages and of the version, by relative names: 64 hex digits, in a few ms."""
    code = hashlib.sha256(f"{crypten_llm.__version__}\n".encode())
    for name in _PACKAGES:  # found and not imported: a command line is read before that
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no package {name}", name=name)
        package = Path(spec.origin).parent
        for path in sorted(path for kind in _PARTS for path in package.rglob(kind)):
            data = path.read_bytes()
            code.update(f"{path.relative_to(package.parent)} {len(data)}\n".encode() + data)
    return code.hexdigest()
