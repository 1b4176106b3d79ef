# Needs make and Python 3.11 or newer; everything else is installed into .venv, at the versions of requirements.lock.

PYTHON ?= python3
ARGS ?=

PIP_VERSION := 26.3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := requirements.lock

.DEFAULT_GOAL := help
.PHONY: help demo flip test check check-lint check-types check-imports check-lock bench lock clean

help:
	@echo "make demo    documents through PostgreSQL (ARGS='--transport celery': RabbitMQ): dispatched, executed, continued, saved"
	@echo "make flip    one flag, flipped under load between Celery and PostgreSQL, and a tally (needs RabbitMQ)"
	@echo "make test    the tests; ARGS='-k codec' is handed to pytest"
	@echo "make check   linter, formatter, types, import contracts, lock"
	@echo "make bench   the benchmarks"
	@echo "make lock    resolve the newest versions and write $(LOCK)"
	@echo "make clean   remove $(VENV), caches, and what the demo saved"
	@echo "PYTHON=python3.12 chooses the interpreter for a new $(VENV); 'make clean' first where there is one."

demo: $(READY)
	@$(BIN)/python -m examples $(ARGS)

flip: $(READY)
	@$(BIN)/python -m examples.flip_the_flag $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	@$(BIN)/python benchmarks/bench.py $(ARGS)
	@echo
	@$(BIN)/python benchmarks/celery_bench.py $(ARGS)

check: check-lint check-types check-imports check-lock

check-lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-types: $(READY)
	$(BIN)/mypy

check-imports: $(READY)
	$(BIN)/lint-imports --no-logo

check-lock: $(READY)
	$(BIN)/python tools/check_lock.py

# $(1): the environment; $(2): options for pip. The build backend comes from the group, so that it is locked as well.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "unstract-wire needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(1)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	@$(1)/bin/python -m pip install -qq $(2) --group dev
	@$(1)/bin/python -m pip install -qq $(2) --no-build-isolation --editable '.[all]'
endef

$(READY): pyproject.toml $(LOCK)
	@echo "Installing into $(VENV); this takes up to a minute, once."
	$(call install,$(VENV),--constraint $(LOCK))
	@touch $@

lock:
	@rm -rf $(VENV)-lock
	$(call install,$(VENV)-lock,)
	@$(VENV)-lock/bin/python tools/check_lock.py --write
	@rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(VENV)-lock dist demo-output .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
