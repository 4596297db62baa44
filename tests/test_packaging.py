"""The wheel: it holds what it needs, asks for what it imports, and runs outside the clone."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import crypten_llm
from crypten_llm.errors import how_to_install

ROOT = Path(__file__).parents[1]
PACKAGES = ("crypten_llm", "eviction")


def run(*command, cwd, code=0) -> str:
    """stdout of a command that ends with ``code``."""
    ended = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=280)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as a build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", ".", *options, "--wheel-dir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tree = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    assert held == {str(path) for path in tree if "__pycache__" not in path.parts}
    needed = ("crypten_llm/shipped/model.safetensors", "crypten_llm/shipped/tokenizer.json")
    assert held >= {*needed, "eviction/weights/locret-shipped.safetensors"}
    assert any(re.fullmatch(r"crypten_llm/protocols/.*\.json", name) for name in held)


def test_the_wheel_asks_for_what_it_imports(wheel):
    files = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    described = message_from_string(files.read(metadata).decode())
    assert described["Version"] == crypten_llm.__version__
    asked = {re.match(r"[\w-]+", line)[0].lower() for line in described.get_all("Requires-Dist")}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert asked == {re.match(r"[\w-]+", line)[0].lower() for line in lines if line}
    assert asked >= {"torch", "transformers", "numba", "cryptography", "omegaconf", "onnx"} and "crypten" not in asked


def test_crypten_is_asked_for_in_the_version_that_runs():
    (pinned,) = re.findall(r"^crypten==\S+", (ROOT / "requirements-crypten.txt").read_text(), re.MULTILINE)
    assert f"pip install --no-deps {pinned}'" in how_to_install("crypten")


@pytest.mark.slow
def test_the_wheel_runs_in_another_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    folder = tmp_path / "venv" / "bin"
    pip = (
        folder / "python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--disable-pip-version-check",
    )
    run(*pip, wheel, cwd=tmp_path)
    assert "'torch' is not installed" in run_failing(folder, tmp_path)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(folder / "python", "-c", code, cwd=tmp_path).strip())
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"])
    assert run(folder / "crypten-llm", "--version", cwd=tmp_path) == f"crypten-llm {crypten_llm.__version__}\n"
    where = run(folder / "python", "-c", "import crypten_llm; print(crypten_llm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    for engine in ("plain", "wire"):
        command = ("generate", "--prompt-ids", "5,6,7", "--max-new-tokens", "2", "--engine", engine)
        answer = run(folder / "crypten-llm", *command, cwd=tmp_path)
        assert answer.strip(), "the shipped model answers from its own files"


def run_failing(folder: Path, cwd: Path) -> str:
    """The error line of a run in an environment without any other package."""
    command = [folder / "crypten-llm", "generate", "--prompt-ids", "5"]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    return ended.stderr
