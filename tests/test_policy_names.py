"""Outside ``eviction/`` a policy's name stands in configurations alone; all else asks the policy."""

import ast
from pathlib import Path

import eviction

ROOT = Path(__file__).parents[1]
PACKAGES = ("crypten_llm", "experiments", "notebooks")
MODULES = {kind.__module__ for kind in eviction.POLICIES.values()}

DEFAULTS = {  # of a command, a request or a measurement, and the one policy that each may name
    "crypten_llm/commands/options.py": "full",
    "crypten_llm/serving/asking.py": "full",
    "crypten_llm/commands/debug_compare.py": "full",
    "crypten_llm/session/request.py": "full",
    "crypten_llm/session/bench.py": "full",
    "crypten_llm/session/plan.py": "full",
    "crypten_llm/session/delivery.py": "full",
    "crypten_llm/serving/stock_metrics.py": "full",
    "experiments/measure/agreement.py": "full",
    "experiments/tune.py": "mpcache",
}
LISTS = {  # which say what is compared, measured or trained
    "experiments/baselines/config.py",
    "experiments/baselines/variants.py",
    "experiments/measure/eviction_agreement.py",
    "experiments/measure/eviction_cost.py",
    "experiments/measure/quality.py",
    "experiments/model/train_policies.py",
    "experiments/tools/decode_files.py",
}


def named(source: str) -> set[str]:
    """Policies that a file names as text, ``NAME`` or ``NAME(...)``, and modules of policies that it imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value.partition("(")[0].strip()} & eviction.POLICIES.keys()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & MODULES
    return found


def test_what_counts_as_naming_a_policy():
    sources = {
        'x = "h2o"': {"h2o"},
        'x = "h2o(heavy=3)"': {"h2o"},
        'x = f"tova(size={size})"': {"tova"},
        'match x:\n    case "quest": pass': {"quest"},
        "from eviction.mpcache import MPCache": {"eviction.mpcache"},
        "from eviction import random as control": {"eviction.random"},
        "import eviction.mikv": {"eviction.mikv"},
        '"""Says that quest reads pages."""\nimport random\nfrom eviction import FULL, trained': set(),
    }
    assert {source: named(source) for source in sources} == sources


def test_no_other_file_names_a_policy():
    found = {
        str(path.relative_to(ROOT)): names
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if (names := named(path.read_text("utf-8")))
    }
    assert {path: found.pop(path, set()) for path in DEFAULTS} == {path: {name} for path, name in DEFAULTS.items()}
    unexpected = {path: names for path, names in found.items() if path not in LISTS}
    assert not unexpected, "ask the policy instead (eviction/policy.py), or list a configuration above"
    assert LISTS == found.keys()
