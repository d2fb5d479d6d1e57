# Everything a contributor runs. `make` alone lists the targets; ARGS="..." is handed on to the
# program that a target runs.

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed

OLDEST := .venv-oldest
OLDEST_STAMP  := $(OLDEST)/.installed
OLDEST_EXTRAS := test

# One thread a worker: two workers with a thread pool each would fight for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test oldest check check-copies check-types check-style format slow crossings speed docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## every method on a small trained model, and a detector, several minutes; nothing is downloaded
	$(BIN)/python -m foveate demo $(ARGS)

test: check ## the checks, then every test but slow ones and crossings
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

oldest: $(OLDEST_STAMP) ## the same tests, with the lowest versions that are promised
	$(OLDEST)/bin/python tests/floors.py --check $(OLDEST_EXTRAS)
	$(ONE_THREAD) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Side by side, the longest first.
check: $(STAMP) ## format, lint, types, layers, duplicate code
	$(MAKE) --no-print-directory --output-sync --jobs $(WORKERS) check-copies check-types check-style

check-copies: $(STAMP)
	$(BIN)/pylint --disable=all --enable=duplicate-code foveate

check-types: $(STAMP)
	$(BIN)/mypy foveate

check-style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

slow: $(STAMP) ## the slow tests: full-size models, compilation
	$(BIN)/python -m pytest -m "slow and not crossing" $(ARGS)

crossings: $(STAMP) ## every method on every form of backbone, hours of compilation included
	$(ONE_THREAD) $(BIN)/python -m pytest -m crossing -n $(WORKERS) --dist worksteal $(ARGS)

speed: $(STAMP) ## measure the table of speed goals
	$(BIN)/python benchmarks/speed.py $(ARGS)

docs: $(DOCS_STAMP) ## build the documentation into site/; warnings are errors
	$(ONE_THREAD) $(BIN)/python -m mkdocs build --strict $(ARGS)

clean: ## remove caches and build output; environments stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path './$(VENV)*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is written last, so an installation that broke off is done again.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

# The floors are read from the package's metadata, so it is installed alone first. Wheels alone: a
# floor without one for this Python is an error at once, not a compilation.
$(OLDEST_STAMP): pyproject.toml tests/floors.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install packaging
	$(OLDEST)/bin/python -m pip install --no-deps -e .
	$(OLDEST)/bin/python tests/floors.py $(OLDEST_EXTRAS) > $(OLDEST)/floors.txt
	$(OLDEST)/bin/python -m pip install --only-binary :all: -c $(OLDEST)/floors.txt -e '.[$(OLDEST_EXTRAS)]'
	touch $@
