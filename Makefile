# All set-up happens here: each command makes .venv first if it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test golden test-contract support check bench clean

demo: $(READY)
	$(BIN)/mmtoken demo --out demo

# A process per core, so each keeps to one thread.
test: export OMP_NUM_THREADS ?= 1
test: $(READY)
	$(PYTEST) -n auto -m "not golden and not contract_full"

golden: $(READY)
	$(PYTEST) -m golden tests/golden

test-contract: export OMP_NUM_THREADS ?= 1
test-contract: $(READY)
	$(PYTEST) tests/contract tests/engine -n auto -m "contract_full or not contract_full" --support tests/contract/support.json

# One setting of every compressor: what the tables of supported pairs need.
support: export OMP_NUM_THREADS ?= 1
support: $(READY)
	$(PYTEST) tests/contract -n auto -m support --support tests/contract/support.json
	$(BIN)/python -m tests.contract.support

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/test_package.py tests/test_readme.py tests/test_cards.py tests/contract/test_support.py

bench: $(READY)
	$(BIN)/mmtoken bench --out bench

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mmtoken needs Python 3.11 or newer; try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo bench .pytest_cache .mypy_cache .ruff_cache
