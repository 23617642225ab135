# Every target does its own set-up: a virtual environment in .venv with the package, its extras and the tools.
# Needed beforehand: Python 3.11 or newer (PYTHON=... names one) and a package index that pip can reach.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.docs_installed
RELEASE_INSTALLED := $(VENV)/.release_installed
PEERS := build/peers
WAYS_OUT := build/ways_out
FRESH := build/fresh
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# the first of these that runs and is new enough (a name on the PATH may be a shim that does not run)
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	$$name -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$name && break; done)

PART ?= 1/1

# nothing here needs the Hub, and a run must not depend on what a machine has cached
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# threads that spin while they wait cost many times the work where other processes share the cores
export OMP_WAIT_POLICY := passive

.PHONY: help demo test test-slow test-census test-ways-out lint bench docs dist clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

demo: $(INSTALLED)  ## fine-tune, prune, retrain and reload a real model; results go to demo_output
	$(BIN)/python examples/bbc_news.py --output demo_output

test: lint  ## lint, types, and all tests that are not marked slow
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)  ## the tests that are marked slow, but the census and the other tools
	$(BIN)/pytest -m slow --ignore=tests/census --ignore=tests/ways_out

test-census: $(INSTALLED)  ## every type of transformers and every family of timm (two hours); PART=1/4 for a part of it
	CENSUS_PART=$(PART) $(BIN)/pytest -n 2 -m slow tests/census

test-ways-out: $(WAYS_OUT)/.installed  ## pruned models in ONNX Runtime, OpenVINO, ExecuTorch, llama.cpp, MLX, bitsandbytes (five minutes)
	$(WAYS_OUT)/bin/python -m pytest tests/ways_out

lint: $(INSTALLED)  ## style, formatting, import rules and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(PEERS)/.installed  ## what it costs and saves, beside other packages; a table in benchmarks/results (an hour, nothing beside it)
	$(PEERS)/bin/python -m benchmarks.costs $(BENCH)

docs: $(DOCS_INSTALLED)  ## build the documents into site/; a broken link is an error
	$(BIN)/mkdocs build --strict

dist: $(RELEASE_INSTALLED)  ## build the package into dist/, check it, and import it from a fresh virtual environment
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd $(FRESH) && bin/python -c "import deeparc_hf; [getattr(deeparc_hf, name) for name in deeparc_hf.__all__]"
	cd $(FRESH) && bin/deeparc env
	rm -rf build

clean:  ## remove what the other targets wrote, except .venv
	rm -rf demo_output runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found. Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making a virtual environment in $(VENV)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@$(BIN)/python -c '$(NEW_ENOUGH)' || { echo "The virtual environment in $(VENV) has a Python older than 3.11. Delete the folder and run make again." >&2; exit 1; }
	@echo "Installing deeparc_hf with its tools into $(VENV) (once; takes some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

# environments of their own, which find the project's packages behind them; a tool that cannot be had is left out
$(PEERS)/.installed: benchmarks/peers.txt
$(WAYS_OUT)/.installed: tests/ways_out/tools.txt
$(PEERS)/.installed $(WAYS_OUT)/.installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import pathlib, sysconfig; print(sysconfig.get_path('purelib')); print(pathlib.Path.cwd())" \
		> $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	grep -v '^#' $(filter %.txt,$^) | while read -r tool; do \
		$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$tool \
		|| echo "$$tool could not be installed: it is left out"; done
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

$(RELEASE_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[release]"
	@touch $@
