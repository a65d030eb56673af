# `make` alone lists what there is. Everything runs in .venv, which is made on first use.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# One thread of arithmetic a process: two under load collapse twenty-fold (CONTRIBUTING.md).
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help quickstart test test-cluster test-faults chaos wheel check format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/make \1|\2/' | column -t -s '|'

.venv/runs: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixmo needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=compat --editable .
	@touch $@

.venv/tests: .venv/runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

quickstart: .venv/runs ## install, run a sweep of 12 trials on real scans, print its table
	@$(BIN)/mixmo run sweeps/quickstart.yaml --yes
	@echo
	@$(BIN)/mixmo table quickstart
	@echo
	@echo "Parquet:  results/sweeps/quickstart/trials.parquet and epochs/"
	@echo "Figures:" && $(BIN)/mixmo figures quickstart

# Ceph, a real S3 server, where there is apt and the right to use it.
test: export MIXMO_TEST_INSTALL := 1
test: .venv/tests ## every test that this machine can run, about 45 minutes on 2 cores
	$(BIN)/python -m pytest -q -n 2 -m "not ray"
	$(BIN)/python -m pytest -m ray --durations=15

# Machines and heads of real Ray clusters that are lost, filled, stopped and shared; alone on the machine.
test-faults: export MIXMO_TEST_FAULTS := 1
test-faults: .venv/tests ## lose, fill, stop and share real Ray clusters; about 15 minutes
	$(BIN)/python -m pytest tests/test_nodes.py tests/test_faults.py -v

chaos: export MIXMO_TEST_INSTALL := 1
chaos: .venv/tests ## kill, freeze and cut off sweeps by the thousand, in pieces; about 75 minutes, see tests/chaos
	$(BIN)/python tests/chaos

# Heads and workers as namespaces of this machine, over SSH: hosts of one's own, then machines of a model of EC2.
test-cluster: export MIXMO_TEST_INSTALL := 1
test-cluster: .venv/tests wheel ## ray up of both files, sweeps, hosts killed, workers from zero and back, ray down; as root, half an hour
	$(BIN)/python tests/cluster/up_and_down.py
	$(BIN)/python tests/cluster/from_zero.py

# From a copy, which says what commit it is of: cluster/*.yaml ship all that lies in dist.
wheel: .venv/runs ## dist/: the wheel, and the versions that it was tested with
	rm -rf dist build && mkdir -p dist build/wheel
	cp -r mixmo_core orchestrator sweeps pyproject.toml README.md LICENSE build/wheel/
	$(BIN)/python -m orchestrator.origin > build/wheel/orchestrator/origin.json
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist ./build/wheel
	cp constraints.txt dist/
	cd dist && echo mixmo_sweeps-*.whl > wheel
	@ls dist

check: .venv/tests ## format, lint, types, import contracts, quick tests, 3 to 4 minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 -m "not ray and not slow"

format: .venv/tests ## rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and the caches, never results
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
