"""Pages name what there is: links lead somewhere, files and modules exist, and what they show of code runs."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from wire_parties import check_cost, play, reconstruct, run, share

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "crypten_llm" / "shipped" / "README.md"]
BASES = [ROOT, ROOT / "crypten_llm"]  # from where files are named
MOST_WORDS = 1400  # of the README: it is read by whoever is new here
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w./*-]+\.(?:py|json|jsonl|md|svg|png|ipynb|txt|safetensors|yaml|service)\b")
MODULE = re.compile(r"-m ((?:crypten_llm|eviction|experiments)[\w.]*)")
OTHERS = {  # files of models, of other projects, and of the reader's own
    *("config.json", "tokenizer.json", "generation_config.json", "manifest.json", "prompt.txt", "kept.png", "pred.py"),
    *("instructions.txt", "extra-openai-models.yaml", "levels.json", "series.json"),
    *("hotpotqa.jsonl", "data/hotpotqa.jsonl", "dataset2prompt.json", "FOLDER/dataset2prompt.json"),
    *("LongBench/config/dataset2prompt.json", "scripts/data/prepare.py", "run_summarization.py"),
    *("FOLDER/4096/data/vt/validation.jsonl", "xsum_0shot.jsonl", "xsum_3shot.jsonl", "xsum_5shot.jsonl"),
    *("h2o_hf/data/xsum.jsonl", "eviction/NAME.py", "kernels/cuda.py", "prompts.jsonl", "answers.jsonl"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    broken = []
    for target in LINK.findall(path.read_text("utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists() or anchor and anchor not in anchors(page):
            broken.append(target)
    return broken


def unknown_files(text: str) -> set[str]:
    """A bare name may stand in any folder of the repository, a path is from the root or from the package."""
    without_links = LINK.sub("]", text)
    names = {name for name in FILE.findall(without_links) if not name.startswith(("/", "http", "//"))}
    known = {
        path.name
        for base in ("crypten_llm", "eviction", "experiments", "tests", "docs", "notebooks", "deploy")
        for path in (ROOT / base).rglob("*")
    } | {path.name for path in ROOT.glob("*")}
    return {
        name
        for name in names - OTHERS
        if not (name in known if "/" not in name else any(list(base.glob(name)) for base in BASES))
    }


def unknown_modules(text: str) -> set[str]:
    return {name for name in MODULE.findall(text) if importlib.util.find_spec(name.rstrip(".")) is None}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_name_what_there_is(path):
    text = path.read_text("utf-8")
    assert broken_links(path) == []
    assert unknown_files(text) == set()
    assert unknown_modules(text) == set()


def test_what_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One title\n[a](page.md#one-title) [b](#other) [c](gone.md) [d](https://example.org/x.md)\n")
    assert broken_links(page) == ["#other", "gone.md"]
    text = "`kernels/ring.py`, `ring.py`, `kernels/rung.py`, `rung.py`, see [it](https://example.org/a/b.py)"
    assert unknown_files(text) == {"kernels/rung.py", "rung.py"}
    assert unknown_modules("`python -m experiments.tune` or python -m experiments.tone") == {"experiments.tone"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= MOST_WORDS


def test_the_protocol_that_is_shown_runs():
    """docs/architecture.md: 64 bits an element and round each way; the dealer's square and product, as wide."""
    (source,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.DOTALL)
    shown: dict = {}
    exec(source, shown)
    x = torch.arange(-5, 6)

    def job(runtime):
        return play(runtime, shown["cubes"](runtime, share(runtime, x)))

    assert torch.equal(reconstruct(run(job)), x**3)
    check_cost(job, (2, 16 * len(x), 16 * len(x), 0, 16 * len(x)))
