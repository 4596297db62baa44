"""The demo: which models it asks, how it ends, and where the published model is looked for."""

from __future__ import annotations

import sys

import pytest

from crypten_llm.errors import UsageError
from experiments import demo
from experiments.tools import real_model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package that holds a file; to import it would fail, as that of the real one does here."""

    def make(file="Smol.Q4_1.gguf"):
        monkeypatch.setattr(real_model, "PACKAGE", "some_package_with_a_model")
        folder = tmp_path / real_model.PACKAGE
        folder.mkdir()
        (folder / "__init__.py").write_text("import a_package_that_is_not_there\n")
        (folder / file).write_bytes(b"0" * 2_000_000)
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder / file

    return make


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(real_model, "PACKAGE", "a_package_that_is_not_there")


@pytest.fixture
def asked(monkeypatch):
    """What the demo asks: (model, prompt); its answers differ from those in the clear for a model in ``differs``."""
    seen, differs = [], set()

    def ask(request, model, progress):
        seen.append((model, request.prompt))
        return model not in differs

    monkeypatch.setattr(demo, "ask", ask)
    monkeypatch.setattr(sys, "argv", ["demo"])
    return seen, differs


def test_the_file_is_found_without_an_import(package):
    path = package()
    assert real_model.find() == real_model.found() == path
    assert real_model.PACKAGE not in sys.modules


def test_what_to_do_where_it_is_not(absent, package, monkeypatch):
    assert real_model.find() is None
    with pytest.raises(UsageError, match="make demo-real"):
        real_model.found()
    package("something.txt")
    assert real_model.find() is None


def test_the_shipped_model_alone(absent, asked, capsys):
    assert demo.main() == 0
    assert [model for model, _ in asked[0]] == ["shipped"]
    assert real_model.ABSENT in capsys.readouterr().err


def test_both_where_both_are(package, asked, monkeypatch):
    path = str(package())
    assert demo.main() == 0
    assert asked[0][0][0] == "shipped" and asked[0][1:] == [(path, demo.QUESTION)]
    asked[1].add(path)
    assert demo.main() == 1
    asked[1].symmetric_difference_update({path, "shipped"})
    assert demo.main() == 1 and len(asked[0]) == 6


def test_the_published_one_alone(package, asked, monkeypatch, capsys):
    path = str(package())
    monkeypatch.setattr(sys, "argv", ["demo", "--real"])
    assert demo.main() == 0 and asked[0] == [(path, demo.QUESTION)]
    assert "2 MB of quantised weights" in capsys.readouterr().err
    monkeypatch.setattr(real_model, "PACKAGE", "a_package_that_is_not_there")
    assert demo.main() == 2
    assert capsys.readouterr().err == f"error: {real_model.ABSENT}\n"
