# Needs make and Python 3.10 or later, nothing else. `make help` lists the targets.
#
#   PYTHON=python3.12   the interpreter
#   CELERY=5.5.0        this very version of Celery instead of the newest
#   TESTS=tests/unit    these tests instead of all
#   ARGS=…              further options: of pytest for test, of the program for the others
#   SECONDS=60 SEED=1   how long soak takes, and what it draws from
#
# Each combination of PYTHON and CELERY has a virtual environment of its own.

PYTHON ?= python3
CELERY ?=
TESTS ?=
ARGS ?=
SECONDS ?= 3600
SEED ?=

VENV := .venv$(addprefix -,$(notdir $(filter-out python3,$(PYTHON))))$(addprefix -celery,$(CELERY))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Folders are listed too: theirs is the time that changes when a file is deleted.
SOURCES := $(shell find isolated_tasks -not -path '*__pycache__*' 2>/dev/null) README.md LICENSE
CODE := isolated_tasks tests docs $(wildcard examples)

MATRIX_PYTHONS ?= python3.10 python3.11 python3.12 python3.13
MATRIX_CELERIES ?= 5.5.0 5.6.0 newest

.DELETE_ON_ERROR:
.PHONY: help demo test docs docs-links reference dist faults lint format coverage matrix interleavings \
	bench bench-limits bench-lifeline bench-audit bench-top fork-safety memory fuzz soak clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## */\1	/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(VENV)/.examples-installed  ## measure a plain worker beside an isolated one, and plot both
	@mkdir -p build/demo
	$(BIN)/python examples/compare_rss.py --output build/demo $(ARGS)
	@echo "The plot is here:"; ls -1 "$(CURDIR)"/build/demo/*.png "$(CURDIR)"/build/demo/*.svg

test: lint  ## check the code, then run all tests on the installed wheel
	$(BIN)/pytest --numprocesses 2 --dist loadfile $(TESTS) $(ARGS)

docs: $(VENV)/.docs-installed  ## build the documentation into build/docs; any warning is an error
	$(BIN)/cog --check --diff -I docs/extensions docs/reference/*.md
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "The first page is here: $(CURDIR)/build/docs/index.html"

docs-links: $(VENV)/.docs-installed  ## ask whether the addresses that the documentation names are there
	$(BIN)/sphinx-build -W --keep-going -q -b linkcheck -d build/doctrees docs build/docs-links

reference: $(VENV)/.docs-installed  ## write what the reference takes from the code anew
	$(BIN)/cog -r -I docs/extensions docs/reference/*.md

faults: $(VENV)/.test-installed  ## run all tests of faults, with what takes long or much memory
	FULL_FAULTS=1 $(BIN)/pytest -m fault --timeout 900 -o faulthandler_timeout=890 $(TESTS) $(ARGS)

lint: $(VENV)/.test-installed  ## check style, format and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)

format: $(VENV)/.test-installed  ## put the code in order
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

coverage: $(VENV)/.test-installed  ## run the tests and tell which lines they miss, in children too
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run $(BIN)/pytest $(TESTS) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

interleavings: $(VENV)/.test-installed  ## kill each process before every single step of a call
	EVERY_STEP=1 $(BIN)/pytest -rP tests/interleavings $(ARGS)

bench: $(VENV)/.test-installed  ## measure what a call costs, against all that is comparable
	PYTHONPATH=tests/support:tests/benchmarks $(BIN)/python -m bench --output build/bench $(ARGS)

bench-limits: $(VENV)/.test-installed  ## measure how exactly time and memory limits are kept
	$(BIN)/python tests/benchmarks/limits.py $(ARGS)

bench-lifeline: $(VENV)/.test-installed  ## measure how soon a group goes with its requester
	PYTHONPATH=tests/support $(BIN)/python tests/benchmarks/lifeline.py $(ARGS)

bench-audit: $(VENV)/.test-installed  ## measure what --memory-audit costs a plain task
	PYTHONPATH=tests/support:tests/benchmarks $(BIN)/python tests/benchmarks/audit_cost.py $(ARGS)

bench-top: $(VENV)/.test-installed  ## measure what `celery isolated top` costs a worker
	PYTHONPATH=tests/support $(BIN)/python tests/benchmarks/top.py $(ARGS)

fork-safety: $(VENV)/.test-installed  ## try which libraries may be loaded, and used, in the forkserver
	PYTHONPATH=$(CURDIR)/tests/support:$(CURDIR)/tests/benchmarks $(BIN)/python -m fork_safety $(ARGS)

memory: $(VENV)/.test-installed  ## measure where freed memory stays, into the page on that
	$(BIN)/python examples/where_memory_goes.py --write docs/explanation/where-memory-goes.md $(ARGS)

fuzz: $(VENV)/.fuzz-installed  ## send 10 million inputs through the frame reader
	PYTHONPATH=tests/support $(BIN)/python tests/fuzz/frames.py $(ARGS)

soak: $(VENV)/.test-installed  ## an hour of calls while processes are killed at random
	PYTHONPATH=tests/support:tests/chaos $(BIN)/python -m soak --output build/soak \
	    --seconds $(SECONDS) --warm-up 30 $(addprefix --seed ,$(SEED)) $(ARGS)

dist: $(VENV)/.release-installed  ## build the wheel and the sdist into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*

# A pyenv that has not made a version global has a shim for it that fails; then its own path is used.
matrix:  ## run the tests (TESTS=tests/contract: these) on each Python and Celery
	@mkdir -p build/matrix; failed=0; \
	for python in $(MATRIX_PYTHONS); do \
	    found=$$python; \
	    $$python -c '' 2>/dev/null || found=$$(ls -d "$$HOME"/.pyenv/versions/*/bin/$$python 2>/dev/null | tail -n 1); \
	    for celery in $(MATRIX_CELERIES); do \
	        log=build/matrix/$$python-celery-$$celery.log; \
	        $(MAKE) --no-print-directory test PYTHON="$${found:-$$python}" CELERY=$${celery#newest} >$$log 2>&1 </dev/null \
	            && result=passed || { result=FAILED; failed=1; }; \
	        echo "$$python celery-$$celery $$result: $$(grep -E '[0-9] (passed|failed|error)|[Ee]rror' $$log | tail -n 1) ($$log)"; \
	    done; \
	done; exit $$failed

clean:  ## remove all that make has made
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: PYTHON=$(PYTHON) must be a Python 3.10 or later: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What the wheel is built with lives in the environment, so that building it again takes no download.
$(VENV)/.build-installed: pyproject.toml | $(BIN)/python
	$(PIP) install 'hatchling>=1.27' 'hatch-fancy-pypi-readme>=25.1'
	@touch $@

# The slow part, once: the dependencies. The wheel is installed here too, since its extras name them.
# celery-batches 0.11 says that it wants celery<5.7, and would keep the newest from being installed.
$(VENV)/.%-dependencies: pyproject.toml | $(VENV)/wheel.stamp
	@echo "Installing the dependencies into $(VENV); this takes a minute or two."
	$(PIP) install "$$(ls $(VENV)/wheel/*.whl)[$*]" $(addprefix celery==,$(CELERY))
	$(if $(filter test,$*),$(PIP) install --no-deps celery-batches)
	@touch $@

# The quick part, whenever a source has changed: the wheel alone.
$(VENV)/.%-installed: $(VENV)/.%-dependencies $(VENV)/wheel.stamp
	$(PIP) install --no-deps --force-reinstall $(VENV)/wheel/*.whl
	@touch $@

$(VENV)/wheel.stamp: pyproject.toml $(SOURCES) $(VENV)/.build-installed
	rm -rf $(VENV)/wheel
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(VENV)/wheel .
	@touch $@

.SECONDARY:
