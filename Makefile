# `make demo` and `make test` do all set-up themselves; everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check format bench bench-adapters experiments clean

demo: $(VENV)/.installed
	@sh fixtures/demo.sh $(BIN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/init.py --json bench-data/init.json

# Installs mergekit, to compare with, into an environment of its own in bench-data/.
bench-adapters: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/adapters.py --json bench-data/adapters.json

# Runs what experiments/ has no result for, and makes its page; MODEL, TRAIN and TEST are paths.
experiments: $(VENV)/.installed-experiments
	$(BIN)/python -m experiments.run --model "$(MODEL)" --train-data "$(TRAIN)" --test-data "$(TEST)"
	$(BIN)/python -m experiments.vision
	$(BIN)/python -m experiments.page

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# The extras below bring the package along.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo-out bench-data experiments-work .mypy_cache .ruff_cache .pytest_cache .hypothesis
