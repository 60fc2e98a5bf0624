# Two commands on a fresh machine with make and Python 3.11 or newer (3.11 and 3.12 are tested):
#   make forward    install, and score sentences.txt with the embedded model
#   make test       install what the tests need, then lint, types and tests
#
# Before a release, and after a change to streaming, to state folders or to how models of other families are read:
#   make test-long  the same, with the tests that take minutes (pytest's marker `long`: every family and
#                   architecture, a thousand schedules, twenty kills) and five times as many examples in property
#                   tests
#
# On Linux the registry's torch brings gigabytes of CUDA; for the build without it:
#   make forward TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# How many processes share the tests.
WORKERS ?= 2
PIP_FLAGS := -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: forward test test-long lint types unit unit-long clean

forward: $(VENV)/.core
	$(BIN)/slowllm forward sentences.txt

# mypy keeps one core busy; alone, it would leave the others idle.
test: lint
	$(MAKE) --no-print-directory -j 2 types unit

test-long: lint types unit-long

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not long"

unit-long: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --hypothesis-profile=long

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slowllm needs Python 3.11 or newer; say: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev,tune,eval,store,swarm,api,web,report]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
