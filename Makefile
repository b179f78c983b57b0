# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint sweep faults kills mutants fuzz bench curves zoo clean

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

# All tables of benchmarks/README.md; DISK=none leaves those on a disk out, which write up to 44 GB.
SIZE ?= 1b
ROUNDS ?= 5
FOLDER ?= /dev/shm
SMALLER ?= 160m
DISK ?= .
PEER ?= $(shell command -v mergekit-yaml)
MERGE = $(BIN)/python benchmarks/merge.py --size $(SIZE) --rounds $(ROUNDS) $(if $(PEER),--peer $(PEER),--no-peer)

bench: $(VENV)/.bench
	$(MERGE) --folder $(FOLDER)
	$(MERGE) --folder $(FOLDER) --size $(SMALLER) --only more --peer-rounds 1
	$(BIN)/python benchmarks/startup.py --folder $(FOLDER)
ifneq ($(DISK),none)
	$(MERGE) --disk $(DISK) --no-peer
	$(MERGE) --disk $(DISK) --no-peer --cold
	$(MERGE) --disk $(DISK) --cold --size 7b --rounds 1
endif

curves: $(VENV)/.bench
	$(BIN)/python benchmarks/sweep.py --folder $(FOLDER) --rounds $(ROUNDS)

# All methods on tiny trained models: what a merge keeps of its experts' skills. ZOO has the law and the addition expert.
ZOO ?= examples/zoo
RESULTS ?= zoo-results
zoo: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python benchmarks/zoo/run.py --zoo $(ZOO) --out $(RESULTS) $(if $(PAGE),--page $(PAGE))

# Headers and indexes against the safetensors library, a million inputs each; atheris has an environment of its own.
RUNS ?= 1000000
FUZZ := .venv-fuzz
fuzz: $(FUZZ)/.done
	$(FUZZ)/bin/python tests/fuzz/run.py header --runs $(RUNS)
	$(FUZZ)/bin/python tests/fuzz/run.py index --runs $(RUNS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@

$(FUZZ)/.done: pyproject.toml
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check --editable . "atheris>=3" "safetensors>=0.6"
	touch $@

clean:
	rm -rf $(VENV) $(FUZZ) examples/out zoo-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
