# What there is to do here: `make help`. Everything happens in .venv, from requirements.lock; nothing else is touched.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The torch that is tested. Its plain version is locked, without what a build of it brings along: the package index that
# is installed from decides between CPU and CUDA.
TORCH := 2.13.0
# The first that runs and is supported: a name on the path may be a shim for a version that is not installed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo up test check fix lock clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## merge four real models over HTTP by three methods, and compare them (a minute)
	@$(BIN)/python deploy/demo/run.py

up: $(STAMP) ## bring up the API, a worker and a broker; data in .catmerge, Ctrl-C stops all
	@$(BIN)/catmerge up

test: check ## everything that must hold: check, then all tests
	$(BIN)/python -m pytest

check: $(STAMP) ## style, types and walls
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP) ## repair what the linter and the formatter can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(STAMP) ## make requirements.lock anew from pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --upgrade --upgrade-package torch==$(TORCH) --all-extras \
		--strip-extras --annotation-style=line --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
		--output-file requirements.lock pyproject.toml
	sed -E -i.old -e 's/^(torch==[0-9.]+)[^ ]*/\1/' -e '/^(nvidia|cuda|triton)/d' requirements.lock
	rm requirements.lock.old

clean: ## remove caches, builds and the demo's results; .venv and the data of `make up` stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .catmerge/demo
	find service workers tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml
	@$(or $(PYTHON),python3) -c '$(IS_SUPPORTED)' 2>/dev/null || { \
		echo "catmerge needs Python 3.11, 3.12 or 3.13; say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV); this takes a minute or two, once ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
