"""What ``compare_baselines`` compares: the configuration, read from TOML or JSON and checked before anything runs."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from crypten_llm.errors import UsageError, did_you_mean
from eviction import FULL
from experiments.baselines import policies as table
from experiments.baselines.variants import ABLATION
from experiments.tasks import find

# What is compared where a run of all would take too long.
COMPARED = ("full", "streaming_llm", "snapkv", "h2o", "quest_every_layer", "mpcache", "mpcache_spread")
SHIPPED_TASKS = ("passkey", "key_value", "one_hop", "two_hop", "few_shot", "span_copy", "variables", "stories")

CHOOSES_CELLS = (
    *("policies", "tasks", "lengths", "budgets", "samples", "long_samples", "text_samples"),
    *("ablation", "crypten", "private"),
)
"""Settings that say which cells there are; the others, model, seed and data, change what is in them."""


@dataclass(frozen=True)
class Ablation:
    """Rows of ``variants.ABLATION``, at these budgets and lengths."""

    rows: tuple[str, ...] = tuple(ABLATION)
    budgets: tuple[float, ...] = (0.05, 0.1, 0.2)
    lengths: tuple[int, ...] = (1024,)


@dataclass(frozen=True)
class CrypTen:
    """Decode steps run on engine ``crypten``, which counts by running: policies, budgets, lengths, and steps of each
    beside one that warms up."""

    policies: tuple[str, ...] = COMPARED
    budgets: tuple[float, ...] = (0.2,)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    steps: int = 2


@dataclass(frozen=True)
class Private:
    """Prompts answered end to end on engine ``wire`` and compared with ``plain``: samples of each task and policy."""

    policies: tuple[str, ...] = COMPARED
    budget: float = 0.2
    tasks: tuple[str, ...] = ("one_hop", "few_shot", "key_value")
    length: int = 256
    samples: int = 2
    tokens: int = 8


@dataclass(frozen=True)
class Config:
    """model, offline: as for ``PrivateLlama``, and a model also by ``real_model.NAME``. policies: names of policies and
    of ``variants.COMPARED``, or texts with settings of their own, which have no budget. tasks: of
    ``experiments.tasks``. data: folder, hub id or text file by source, for tasks that read one. lengths: prompt tokens.
    budgets: shares of the prompt. samples: prompts of each task and length; long_samples: the same where the length is
    above 1,024. text_samples: the same for texts.

    Raises UsageError for names that there are not, and values that do not fit.
    """

    model: str = "shipped"
    offline: bool = False
    seed: int = 0
    policies: tuple[str, ...] = tuple(table.names())
    tasks: tuple[str, ...] = SHIPPED_TASKS
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    budgets: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    samples: int = 50
    long_samples: int = 50
    text_samples: int = 12
    data: dict[str, str] = field(default_factory=dict)
    ablation: Ablation = Ablation()
    crypten: CrypTen = CrypTen()
    private: Private = Private()

    def __post_init__(self):
        for name in (*self.policies, *self.crypten.policies, *self.private.policies):
            table.check_name(name)
        for row in self.ablation.rows:
            _one_of("row of the ablation", row, ABLATION)
        for task in (*self.tasks, *self.private.tasks):
            find(task)
        if FULL.name not in self.policies:
            raise UsageError(f"policies lack '{FULL}', which all others are compared with; add it")
        for name in ("tasks", "lengths", "budgets"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty; give at least one")
        for budget in (*self.budgets, *self.ablation.budgets, *self.crypten.budgets, self.private.budget):
            if not 0 < budget < 1:
                raise UsageError(f"budget {budget!r} is no share of the prompt; give numbers above 0 and below 1")
        for length in (*self.lengths, *self.ablation.lengths, *self.crypten.lengths, self.private.length):
            if length < 1:
                raise UsageError(f"length {length!r} is no number of prompt tokens; give 1 or more")
        for length in self.ablation.lengths:
            if self.ablation.rows and length not in self.lengths:
                raise UsageError(f"the ablation has length {length}, which is not in lengths; add it there")
        for part, name, least in (
            *((self, name, 2) for name in ("samples", "long_samples", "text_samples")),
            *((self.private, name, 1) for name in ("samples", "tokens")),
            (self.crypten, "steps", 1),
        ):
            if getattr(part, name) < least:
                raise UsageError(f"{name} is {getattr(part, name)!r}; it must be {least} or more")

    def count(self, task: str, length: int) -> int:
        """Examples of a task at a length."""
        if find(task).metric == "perplexity":
            return self.text_samples
        return self.samples if length <= 1024 else self.long_samples

    def to_dict(self) -> dict:
        """As JSON, and as ``from_dict`` takes it."""
        return json.loads(json.dumps(asdict(self)))


def from_dict(given: dict, kind=Config, where: str = ""):
    """A configuration from nested dictionaries; what is left out keeps its default.

    Raises UsageError for a name that there is not or a value of another type.
    """
    known, made = {entry.name: entry for entry in fields(kind)}, {}
    default = kind()
    for name, value in given.items():
        if name not in known:
            there_are = ", ".join(known)
            raise UsageError(f"unknown setting {where}{name!r}: {did_you_mean(name, known)}choose from {there_are}")
        made[name] = _typed(value, getattr(default, name), f"{where}{name}")
    return kind(**made)


def _typed(value, default, name: str):
    if isinstance(default, Ablation | CrypTen | Private):
        if isinstance(value, dict):
            return from_dict(value, type(default), f"{name}.")
    elif isinstance(default, tuple):
        if isinstance(value, list) and all(_fits(entry, default[0]) for entry in value):
            return tuple(type(default[0])(entry) for entry in value)
    elif _fits(value, default):
        return type(default)(value)
    raise UsageError(f"setting {name} is {value!r}; give {_kind_of(default)}")


def _fits(value, default) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


def _kind_of(default) -> str:
    if isinstance(default, tuple):
        return f"a list such as {json.dumps(default)}"
    return f"a value such as {json.dumps(default)}" if not hasattr(default, "__dict__") else "a table of settings"


def _one_of(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageError(f"unknown {what} {name!r}: {did_you_mean(name, known)}choose from {', '.join(known)}")


def load(path: Path) -> Config:
    """A configuration from a file that ends in .toml or .json. Raises UsageError for one that cannot be used."""
    try:
        text = path.read_text("utf-8")
        given = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; --print-config prints one to start from") from None
    except (ValueError, UnicodeDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UsageError(f"{path} is not {kind}: {error}; --print-config prints one to start from") from None
    if not isinstance(given, dict):
        raise UsageError(f"{path} holds no settings; --print-config prints one to start from")
    return from_dict(given)


def as_toml(config: Config) -> str:
    """The text of a file that ``load`` reads."""
    plain, tables = [], []
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]", *(f"{key} = {json.dumps(entry)}" for key, entry in value.items())]
        else:
            plain.append(f"{name} = {json.dumps(value)}")
    return "\n".join(plain + tables) + "\n"


QUICK = Config(
    policies=("full", "streaming_llm", "h2o", "snapkv", "quest_every_layer", "mpcache", "mpcache_spread", "random"),
    tasks=("passkey", "two_hop", "few_shot", "stories"),
    lengths=(128, 256),
    budgets=(0.1, 0.2),
    samples=4,
    text_samples=2,
    ablation=Ablation(rows=("mean summary", "static only"), budgets=(0.2,), lengths=(256,)),
    crypten=CrypTen(policies=("full", "mpcache"), lengths=(128,), steps=1),
    private=Private(policies=("full", "mpcache"), tasks=("few_shot",), length=128, samples=1, tokens=4),
)
