# Needs make and Python 3.11 or newer; everything else is installed into .venv, at the versions of requirements.lock.

PYTHON ?= python3
ARGS ?=

PIP_VERSION := 26.3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := requirements.lock
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
DOCS_LOCK := requirements-docs.lock
VERSIONS := 3.11 3.12 3.13

# tests/conftest.py chooses the number of processes, tests/scheduling.py the tests that share one. Compiled test files
# are kept even if PYTHONDONTWRITEBYTECODE is set: without them each process takes seconds more.
export PYTHONDONTWRITEBYTECODE :=
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(PARALLEL)
# The tests that need no server: the core, the memory transport and the quick tests of the kit and the chaos.
FAST := tests/core tests/examples/test_extraction.py tests/examples/test_product.py tests/examples/test_tally.py \
	tests/chaos/test_journal.py tests/chaos/test_ledger.py tests/chaos/test_report.py tests/chaos/test_schedule.py \
	tests/cli/test_help_and_version.py tests/cli/test_tables.py tests/kit/test_table_of_faults.py tests/packaging/test_lock.py

# These tests are about forks, signals and the lines that run. Coverage changes all three in the processes that it measures.
UNCOVERED := $(addprefix --deselect tests/,cli/test_forking.py cli/test_worker.py::test_a_second_signal_exits_at_once \
	examples/test_demo.py::test_ctrl_c_leaves_nothing_running_on_postgres postgres/test_crash_consistency.py)

.DEFAULT_GOAL := help
.PHONY: help demo flip test test-fast test-all coverage matrix kit fuzz chaos soak memory check check-lint check-types check-imports check-lock check-schema check-golden check-faults bench lock schema golden faults docs clean

help:
	@echo "make demo    send documents through PostgreSQL (ARGS='--transport celery': RabbitMQ), with tasks and callbacks"
	@echo "make flip    switch a flag under load between Celery and PostgreSQL, and count the tasks (needs RabbitMQ)"
	@echo "make test    the tests, without those that are marked slow; ARGS='-k codec' is passed to pytest"
	@echo "make test-fast  the tests that need no server"
	@echo "make test-all   every test, with more random examples, and the chaos run"
	@echo "make coverage   make test, and measure the lines and branches that it runs, also in subprocesses"
	@echo "make matrix     make test-fast on each installed Python of $(VERSIONS), in separate environments $(VENV)-VERSION"
	@echo "make check   linter, formatter, types, import contracts, lock, the wire's schema, golden files, table of faults"
	@echo "make bench   the benchmarks"
	@echo "make kit     the conformance kit; ARGS='--transport memory', or a URL, or module:factory of your harness"
	@echo "make fuzz    fuzz the readers of the wire for four minutes; ARGS=600 sets the number of seconds"
	@echo "make chaos   kill workers, connections and servers under load, and check that no message is lost; ARGS='--seed 7'"
	@echo "make soak    the same for half an hour; ARGS='--seconds 7200' for longer"
	@echo "make memory  check that the memory of a worker is constant over 200,000 tasks"
	@echo "make schema  write the JSON Schema of the wire from the types"
	@echo "make lock    resolve the newest versions and write $(LOCK)"
	@echo "make golden  add new files of contract_tests/golden to its manifest; listed files are never changed"
	@echo "make faults  write the table of planted faults into docs/conformance.md"
	@echo "make docs    build the site with the API reference into site/; fails on a broken link"
	@echo "make clean   remove $(VENV), caches, and the files that the demo saved"
	@echo "PYTHON=python3.12 chooses the interpreter of a new $(VENV); run 'make clean' first if $(VENV) exists."

demo: $(READY)
	@$(BIN)/python -m examples $(ARGS)

flip: $(READY)
	@$(BIN)/python -m examples.flip_the_flag $(ARGS)

test: $(READY)
	@$(PYTEST) $(ARGS)

test-fast: $(READY)
	@$(PYTEST) $(FAST) $(ARGS)

test-all: $(READY)
	@HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-all} $(PYTEST) --slow $(ARGS)
	@$(BIN)/python -m chaos

coverage: $(READY)
	@rm -f .coverage .coverage.*
	@failed=0; COVERAGE_FILE=$(CURDIR)/.coverage $(BIN)/python -m coverage run -m pytest $(PARALLEL) $(UNCOVERED) $(ARGS) || failed=1; \
		$(BIN)/python -m coverage combine -q && $(BIN)/python -m coverage report && exit $$failed

# `python3.12` may be a shim of pyenv that does not start Python, so each candidate is tried.
matrix:
	@tested=""; for version in $(VERSIONS); do \
		for python in python$$version $$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python 2>/dev/null); do \
			$$python -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null || continue; \
			printf '\n== Python %s: %s\n' $$version $$python; \
			$(MAKE) --no-print-directory test-fast PYTHON=$$python VENV=$(VENV)-$$version || exit 1; \
			tested="$$tested $$version"; break; \
		done; \
	done; \
	[ -n "$$tested" ] || { echo "none of Python $(VERSIONS) was found" >&2; exit 1; }; \
	printf '\nThe fast tests pass on Python%s.\n' "$$tested"

bench: $(READY)
	@$(BIN)/python benchmarks/bench.py $(ARGS)
	@echo
	@$(BIN)/python benchmarks/celery_bench.py $(ARGS)
	@echo
	@$(BIN)/python -m benchmarks.latency $(ARGS)

kit: $(READY)
	@$(BIN)/python -m contract_tests $(ARGS)

# atheris is neither in the lock nor in dev, because it does not support every Python that this package supports.
fuzz: $(READY)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -qq --group fuzz || { \
		echo "atheris cannot be installed for $$($(BIN)/python --version), so nothing was fuzzed." >&2; exit 1; }
	@$(BIN)/python -m fuzz $(ARGS)

chaos: $(READY)
	@$(BIN)/python -m chaos $(ARGS)

soak: $(READY)
	@$(BIN)/python -m chaos --soak $(ARGS)

memory: $(READY)
	@$(BIN)/python benchmarks/worker_memory.py $(ARGS)

check: check-lint check-types check-imports check-lock check-schema check-golden check-faults

check-lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-types: $(READY)
	$(BIN)/mypy

check-imports: $(READY)
	$(BIN)/lint-imports --no-logo

check-lock: $(READY)
	$(BIN)/python tools/check_lock.py

check-schema: $(READY)
	$(BIN)/python tools/check_schema.py
	$(BIN)/unstract-wire schema --check-against tests/releases/task_payload.v1.json

check-golden: $(READY)
	$(BIN)/python tools/check_golden.py

golden: $(READY)
	@$(BIN)/python tools/check_golden.py --write

check-faults: $(READY)
	$(BIN)/python tools/check_faults.py

faults: $(READY)
	@$(BIN)/python tools/check_faults.py --write

# $(1): the environment to create.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "unstract-wire needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(1)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
endef

# $(1): the environment; $(2): options for pip. The build backend comes from the group, so that it is locked as well.
define install
	$(call venv,$(1))
	@$(1)/bin/python -m pip install -qq $(2) --group dev
	@$(1)/bin/python -m pip install -qq $(2) --no-build-isolation --editable '.[all]'
endef

$(READY): pyproject.toml $(LOCK)
	@echo "Installing into $(VENV); this takes up to a minute, once."
	$(call install,$(VENV),--constraint $(LOCK))
	@touch $@

# In an environment of its own, so that nothing else has to install it.
$(DOCS_READY): pyproject.toml $(DOCS_LOCK)
	@echo "Installing into $(DOCS_VENV); this takes some seconds, once."
	$(call venv,$(DOCS_VENV))
	@$(DOCS_VENV)/bin/python -m pip install -qq --constraint $(DOCS_LOCK) --group docs
	@touch $@

docs: $(DOCS_READY)
	@$(DOCS_VENV)/bin/python tools/check_lock.py --docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --clean
	@echo "site/index.html"

schema: $(READY)
	@$(BIN)/python tools/check_schema.py --write

lock:
	@rm -rf $(VENV)-lock
	$(call install,$(VENV)-lock,)
	@$(VENV)-lock/bin/python tools/check_lock.py --write
	@rm -rf $(VENV)-lock
	$(call venv,$(VENV)-lock)
	@$(VENV)-lock/bin/python -m pip install -qq --group docs
	@$(VENV)-lock/bin/python tools/check_lock.py --docs --write
	@rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(VENV)-lock $(DOCS_VENV) $(VERSIONS:%=$(VENV)-%) .coverage .coverage.* site .fuzz dist demo-output .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
