"""How commands of the experiments end."""

import importlib
import sys
from pathlib import Path

import pytest

import experiments
from crypten_llm.errors import CryptenLLMError, PartyError, UsageError
from experiments.tools.command import command

FOLDER = Path(experiments.__file__).parent
COMMANDS = [  # of files; a package's __main__ hands over to the command line that crypten_llm has too
    path
    for path in sorted(FOLDER.rglob("*.py"))
    if "\ndef main(" in path.read_text("utf-8") and path.name != "__main__.py"
]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("policy 'h20' is not known;\ntake h2o"), 2, "error: policy 'h20' is not known; take h2o\n"),
        (PartyError("rank 1 stopped"), 3, "error: rank 1 stopped\n"),
        (CryptenLLMError("a worker was ended"), 1, "error: a worker was ended\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_an_error_of_the_users_is_one_line(capsys, error, code, line):
    @command
    def main():
        raise error

    assert main() == code
    assert capsys.readouterr() == ("", line)


def test_a_mistake_of_the_projects_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 // 0)()


def test_commands_say_how_they_ended():
    assert command(lambda: None)() == 0
    assert command(lambda: 1)() == 1


def test_every_command_ends_so():
    assert len(COMMANDS) > 15
    for path in COMMANDS:
        name = ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
        assert importlib.import_module(name).main.__wrapped__, name
        assert 'if __name__ == "__main__":\n    sys.exit(main())\n' in path.read_text("utf-8"), name


def test_a_policy_that_there_is_not(monkeypatch, capsys):
    from experiments.measure import quality

    monkeypatch.setattr(sys, "argv", ["quality", "--policies", "h20", "--samples", "1", "--workers", "1"])
    assert quality.main() == 2
    assert "error: unknown policy 'h20'; did you mean 'h2o'?" in capsys.readouterr().err
