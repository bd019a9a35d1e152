# Everything runs in .venv, at the versions in requirements.lock.txt. Needs Python 3.11 or later.

# The first interpreter that runs, is new enough and can make a virtual environment.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { command -v $$python; break; }; done)

BIN := .venv/bin
STAMP := .venv/.installed
PYTEST_ARGS ?=
# processes that share the tests, file by file; each works with one thread
JOBS ?= 2
# in the order of tests/conftest.py: files of short tests come last
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# installed apart from .venv: what looks at the dependencies is none of them
AUDIT := pip-audit==2.10.1

# PyTorch's profiler prints two lines for every use, else
export KINETO_LOG_LEVEL ?= 99

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv demo test quick thorough benchmark benchmark-full support audit lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.venv: $(STAMP) ## Create the virtual environment and install gfprune in it, with what the tests use

$(STAMP): pyproject.toml requirements.lock.txt
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
		python="$(PYTHON)"; \
		test -n "$$python" || { echo "make: no Python >= 3.11 with venv and ensurepip found;" \
			"install one (on Debian also its -venv package) or set PYTHON=/path/to/python" >&2; exit 1; }; \
		echo "Creating .venv with $$python" >&2; \
		"$$python" -m venv --clear .venv; \
	fi
	@echo "Installing gfprune and its dependencies into .venv (a few minutes the first time)" >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
		-c requirements.lock.txt -e '.[dev,audio,data,fuzz,onnx,openvino,tensorboard]'
	@# the tests compare with clean-fid, and need none of the torchvision that it asks for
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
		-c requirements.lock.txt --no-deps clean-fid
	@touch $@

demo: $(STAMP) ## Prune the checkpoint that ships with gfprune to half its parameters and MACs
	@$(BIN)/gfprune prune --model demo --sparsity 0.5 --out demo-pruned --force

test: lint ## Lint, check types and run every test (PYTEST_ARGS="-k name" to choose)
	$(BIN)/python -m pytest -q $(SHARED) $(PYTEST_ARGS)

quick: $(STAMP) ## A first verdict in two minutes: one case of each test of the rooms, one command (no lint)
	$(BIN)/python -m pytest -q $(SHARED) --quick $(PYTEST_ARGS)

thorough: $(STAMP) ## All cases of every test, and the long form of the reliability tests: hours
	$(BIN)/python -m pytest -q $(SHARED) --thorough $(PYTEST_ARGS)

benchmark: $(STAMP) ## Compare with other methods, quick form, into docs/benchmarks/quick/
	$(BIN)/python benchmarks/quality.py --quick
	$(BIN)/python benchmarks/speed.py --quick

benchmark-full: $(STAMP) ## The full comparison and the studies behind the defaults (hours)
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/chain.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/speed.py

support: $(STAMP) ## Run gfprune over the tiny pipelines and networks of diffusers' tests (DIFFUSERS=checkout), into docs/support.md
	$(BIN)/python tests/support/zoo $(DIFFUSERS) --write
	$(BIN)/python tests/support/zoo $(DIFFUSERS) --write --bare

audit: $(STAMP) ## Look the pinned dependencies up in a database of known vulnerabilities (needs a network)
	@test -x .venv/audit/bin/pip-audit || { $(BIN)/python -m venv .venv/audit && \
		.venv/audit/bin/python -m pip install -qq --disable-pip-version-check --no-input $(AUDIT); }
	.venv/audit/bin/pip-audit --requirement requirements.lock.txt --no-deps --disable-pip

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Mend formatting, import order and what ruff can mend safely
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

clean: ## Remove caches, build results and the demo's output; .venv stays
	rm -rf build dist demo-pruned .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find gfprune_cli tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
