"""API keys: where they come from, and which cannot be used."""

import pytest

from crypten_llm.errors import UsageError
from crypten_llm.serving.guard import VARIABLE, read_keys

KEY, OTHER = "a" * 32, "b" * 16


def written(folder, text, mode=0o600):
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_from_a_file_and_the_environment(tmp_path):
    path = written(tmp_path, f"# mine\n{KEY}\n\n {OTHER} \n{KEY}\n")
    assert read_keys(path, {VARIABLE: "c" * 20}) == ["c" * 20, KEY, OTHER]
    assert read_keys(path, {}) == [KEY, OTHER] and read_keys("", {VARIABLE: " "}) == []


@pytest.mark.parametrize(
    "text, mode", [("short\n", 0o600), (f"{KEY} x\n", 0o600), ("é" * 20, 0o600), (KEY, 0o640), ("", 0o600)]
)
def test_what_is_no_file_of_keys(tmp_path, text, mode):
    with pytest.raises(UsageError) as refused:
        read_keys(written(tmp_path, text, mode), {})
    assert KEY not in str(refused.value)


def test_comments_alone_are_no_keys(tmp_path):
    with pytest.raises(UsageError, match="holds no key"):
        read_keys(written(tmp_path, "# none\n"), {})
