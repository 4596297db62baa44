"""The committed bench of the published model: what it asks for exists, and its name leads to the model."""

from pathlib import Path

import pytest

from crypten_llm.errors import UsageError
from experiments.baselines import config
from experiments.baselines.cells import texts
from experiments.baselines.policies import has_budget
from experiments.tasks import TASKS, find
from experiments.tools import real_model

FILE = Path(config.__file__).with_name("smollm2.toml")


def test_the_configuration_holds():
    found = config.load(FILE)
    assert found.model == real_model.NAME and found.lengths == (1024, 2048)
    assert {name for name, task in TASKS.items() if task.source in ("ruler", "prose")} == set(found.tasks)
    assert not found.data and not found.ablation.rows and not found.crypten.policies
    for length in found.lengths:
        with_budget = sum(map(has_budget, found.policies))
        assert len(texts(found, length, 9)) == len(found.policies) + with_budget * (len(found.budgets) - 1)
    assert all(find(task).source != "shipped" for task in found.private.tasks)


def test_a_name_leads_to_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "find", lambda: tmp_path / "x.gguf")
    assert real_model.resolved(real_model.NAME) == str(tmp_path / "x.gguf")
    assert real_model.resolved("shipped") == "shipped"
    monkeypatch.setattr(real_model, "find", lambda: None)
    with pytest.raises(UsageError, match="is not installed; 'make demo-real' gets it"):
        real_model.resolved(real_model.NAME)
