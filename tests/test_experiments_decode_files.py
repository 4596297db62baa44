"""The count of files that a decode step runs: it sees what runs and nothing else.

A step on ``wire`` runs 48: each of a layer's protocols is a file, and so is each of the kernels under them. The bound
is there for who adds one to the way of every step.
"""

from pathlib import Path

import pytest

from crypten_llm.errors import UsageError
from experiments.tools import decode_files
from experiments.tools.decode_files import ROOT, RUNS, files_of_a_step


def test_what_runs_is_listed_and_what_does_not_is_not():
    plain, wire, chosen = (set(map(str, files_of_a_step(*run))) for run in RUNS.values())
    assert len(plain) <= 9 and len(wire) <= 48, "a step's way through the code has become longer"
    both = {"crypten_llm/models/llama.py", "crypten_llm/session/generation.py"}
    assert plain >= both | {"crypten_llm/engines/plain/engine.py"} and wire >= both
    assert not any("wire" in name or "links/transport" in name for name in plain)
    assert wire >= {"crypten_llm/engines/wire/engine.py", "crypten_llm/links/transport.py"}
    assert "eviction/mpcache_spread.py" in chosen - wire
    # Imported by all three, and run before the step or after it alone.
    for name in ("crypten_llm/models/checkpoint.py", "crypten_llm/models/config.py", "crypten_llm/errors.py"):
        assert (ROOT / name).is_file() and name not in plain | wire | chosen


def test_the_command(capsys):
    assert decode_files.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.partition(":")[0] for head in heads] == list(RUNS)
    for head in heads:
        listed = lines[lines.index(head) + 1 :][: int(head.split(": ")[-1].split()[0])]
        counts, names = zip(*(line.split() for line in listed), strict=True)
        assert f"{sum(map(int, counts)):,} lines" in head and all((ROOT / Path(name)).is_file() for name in names)


def test_an_engine_without_these_steps():
    with pytest.raises(UsageError, match="engine is 'crypten'"):
        files_of_a_step("crypten")
