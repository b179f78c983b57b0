# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint sweep faults kills mutants bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test lint
	$(BIN)/pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernels once more with every index checked.
sweep: $(VENV)/.test
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(VENV)/checked $(BIN)/pytest -n 2 tests/conformance/test_kernels.py

# Every file operation of a merge fails once; strace injects errors; mounts are full or read-only.
faults: $(VENV)/.test
	SMELT_TEST_STRIDE=1 $(BIN)/pytest -s -rs tests/e2e/test_faults.py tests/faults/system.py

# SIGKILL at every file operation and at random times, and resume: some minutes.
kills: $(VENV)/.test
	$(BIN)/pytest -s tests/faults/kills.py

mutants: $(VENV)/.test
	$(BIN)/python tests/mutation/mutants.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/merge.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) examples/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
