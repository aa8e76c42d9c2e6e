# Two commands do everything on a machine with Python 3.11 or newer:
#   make train    environment, data, the tiny model trained, a sample of what it writes
#   make test     environment, the whole test suite
# Each step leaves a mark when it has succeeded and is not done again; one that was interrupted is.

VENV        := .venv
DATA        := data/stdlib
PIP_FLAGS   ?=
TRAIN_FLAGS ?=
TEST_FLAGS  ?=
# A file of tests runs in one of two processes, in the order of the listing: the last files are short ones. Each process
# has one thread: on two cores, two of them with two threads each wait for one another.
TEST_SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

# The first interpreter that is new enough; `make train PYTHON=...` takes another one.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON     ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
                "$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)

BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: train test lint clean help

train: $(VENV)/.ready-train $(DATA)/meta.json  ## set up, prepare the data, train the tiny model, show a sample
	$(BIN)/moe-train --config configs/tiny.toml $(TRAIN_FLAGS)

test: $(VENV)/.ready-test  ## set up and run the whole test suite, in two processes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(TEST_SPREAD) $(TEST_FLAGS)

lint: $(VENV)/.ready-test  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the environment and caches; data/ and out/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / {printf "make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'PYTHON=python3.12    another interpreter than the first one that is 3.11 or newer'
	@echo 'PIP_FLAGS="..."      more options for pip install'
	@echo 'TRAIN_FLAGS="..."    more options for moe-train, for example --max_iters 100'
	@echo 'TEST_FLAGS="..."     more options for pytest, for example -m slow, or -n 0 for one process'

$(DATA)/meta.json: | $(VENV)/.ready-train
	$(BIN)/moe-prepare --source stdlib --tokenizer o200k_base:4096 --out_dir $(DATA)

$(VENV)/.ready-train: pyproject.toml setup.py | $(VENV)/.made
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[offline]'
	touch $@

$(VENV)/.ready-test: pyproject.toml setup.py | $(VENV)/.made
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[test]'
	touch $@

# An environment that works is kept as it is, whoever made it; a broken or half-made one is made anew.
$(VENV)/.made:
	@'$(PYTHON)' -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	    echo "error: needs Python 3.11 or newer, $(or $(PYTHON),python3) is" \
	         "$$('$(or $(PYTHON),python3)' --version 2>/dev/null || echo 'not there');" \
	         "name another with PYTHON=/path/to/python" >&2; exit 1; }
	@$(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || { \
	    echo "making the environment $(VENV)"; '$(PYTHON)' -m venv --clear $(VENV); }
	@touch $@
