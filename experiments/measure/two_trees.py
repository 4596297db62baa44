"""A decode step on engine ``wire`` by the code of two checkouts, side by side: what a change has cost, or saved.

    git worktree add /tmp/before COMMIT
    python -m experiments.measure.two_trees /tmp/before --steps 16
    python -m experiments.measure.two_trees /tmp/before --steps 16 --tape

Owner and client, and a dealer or a tape each, of both checkouts are in processes of their own and take steps in turn:
one of the first, one of the second, one of the second, one of the first. So whatever else the machine does, both meet
it alike. A step is a token, by default of SmolLM2's sizes after 256 others. For each figure the table has the median of
both, and of the pairs' ratios the median and quartiles: below zero where this checkout is faster than the other one.
``wall`` is from the start of the step to the end at the last role; the others are processor time, of all and of each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles

from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.roles import role_names
from experiments.measure.compare_engines import SHAPES
from experiments.tools import kept, step_by_step
from experiments.tools.command import command
from experiments.tools.tables import print_table

HERE = Path(__file__).parents[2]
WARM_UP = 2


class Tree:
    """The parties of one checkout, ready to take steps. Use as a context: they end with it."""

    def __init__(self, path: Path, sizes: dict, steps: int, folder: Path | None) -> None:
        """folder: where its tape is dealt to; ``None`` for a live dealer. steps: how many there will be."""
        self.path, self.figures = path, []
        self._environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        job = {"sizes": sizes, "steps": steps}
        tape = "" if folder is None else str(folder / "tape")
        if tape and subprocess.run(self._call(job | {"out": tape}), cwd=path, env=self._environment).returncode:
            raise CryptenLLMError(f"{path} deals no tape: see above")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            job |= {"port": listener.getsockname()[1], "tape": tape}
        self._processes = [
            subprocess.Popen(
                self._call(job | {"rank": rank}),
                cwd=path,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2 if tape else 3)
        ]

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def _call(self, job: dict) -> list[str]:
        return [sys.executable, "-P", step_by_step.__file__, json.dumps(job)]

    def _lines(self) -> list[str]:
        """The next line of every party."""
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            raise CryptenLLMError(f"a party of {self.path} ended: see above")
        return lines

    def wait(self) -> None:
        """Until all are ready."""
        self._lines()

    def step(self) -> dict:
        """Milliseconds of the next one."""
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()
        took = [json.loads(line) for line in self._lines()]
        cpu = {f"cpu of {name}": 1e3 * each["cpu"] for name, each in zip(role_names(2), took, strict=False)}
        return {"wall": 1e3 * max(each["wall"] for each in took), "cpu": sum(cpu.values())} | cpu


def measure(other: Path, sizes: dict, steps: int, with_tape: bool) -> list[dict]:
    """A row for each figure of a step."""
    with tempfile.TemporaryDirectory(prefix="two-trees-") as root:
        folders = [Path(root) / name if with_tape else None for name in ("here", "there")]
        with Tree(HERE, sizes, WARM_UP + steps, folders[0]) as here:
            with Tree(other, sizes, WARM_UP + steps, folders[1]) as there:
                for tree in (here, there):
                    tree.wait()
                pairs = [_pair(here, there, turn) for turn in range(WARM_UP + steps)][WARM_UP:]
    return [_row(figure, pairs) for figure in pairs[0][0]]


def _pair(here: Tree, there: Tree, turn: int) -> tuple[dict, dict]:
    """One step of each, this checkout's first, and who was second before is first now."""
    if turn % 2:
        second = there.step()
        return here.step(), second
    return here.step(), there.step()


def _row(figure: str, pairs: list[tuple[dict, dict]]) -> dict:
    ratios = [100 * (here[figure] / there[figure] - 1) for here, there in pairs]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "figure": figure,
        "here, ms": round(median(here[figure] for here, _ in pairs), 1),
        "there, ms": round(median(there[figure] for _, there in pairs), 1),
        "here against there": f"{middle:+.1f} %",
        "quartiles": f"{low:+.1f} to {high:+.1f} %",
    }


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--shape", choices=list(SHAPES), default="SmolLM2", metavar="NAME", help="(default: SmolLM2)")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the shape's")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="pairs of steps (default: 16)")
    parser.add_argument("--tape", action="store_true", help="a tape instead of a live dealer")
    parser.add_argument("--json", type=Path, metavar="F", help="keep the table")
    given = parser.parse_args(arguments)
    other = given.other.resolve()
    if not (other / "crypten_llm" / "session" / "bench.py").exists():
        raise UsageError(f"{other} is no checkout of this repository; make one: git worktree add {other} COMMIT")
    if given.steps < 1:
        raise UsageError(f"--steps is {given.steps}; it must be 1 or more")
    sizes = {name: value for name, value in asdict(SHAPES[given.shape]).items() if name in OLD_SIZES}
    rows = measure(other, sizes | ({"layers": given.layers} if given.layers else {}), given.steps, given.tape)
    kept.save(given.json, {"other": str(other), "shape": given.shape, "steps": given.steps, "rows": rows})
    print_table(rows)


OLD_SIZES = ("hidden", "heads", "kv_heads", "ffn", "layers", "kv_len", "vocab")  # that every ``Shape`` ever had


if __name__ == "__main__":
    sys.exit(main())
