"""Where a result comes from: the revision, the versions and the machine, as every result file carries them."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from crypten_llm.session.settings import cores

ROOT = Path(__file__).parents[2]


def provenance(*packages: str, device: str = "cpu") -> dict:
    """Facts of this run. packages: those whose versions matter beside torch. device: where parties compute; of a GPU
    the name is a fact too.
    """
    return {
        "revision": revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}},
        "machine": f"{cores()} cores, {processor()}",
        **({"card": card()} if "cuda" in device else {}),
    }


def card() -> str:
    """This machine's GPU, as its driver calls it."""
    return torch.cuda.get_device_name()


def sign(result: dict, *packages: str, device: str = "cpu") -> None:
    """Adds this run to those that made ``result`` (its ``made_by``), once; to be called when it adds a figure."""
    mine, makers = provenance(*packages, device=device), result.setdefault("made_by", [])
    if mine not in makers:
        makers.append(mine)


@cache
def revision() -> str | None:
    """The commit of this clone, with ``+`` where files that git knows have changed since; ``None`` outside one.

    As found first: that is the code which this process runs, and ``sign`` asks at every figure.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
