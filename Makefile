# `make` prints the targets. `make demo` and `make test` each take a fresh machine all the way.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test notebooks export outputs lint wheel constraints bench bench-training clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install the project with its development dependencies

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "make setup: $(PYTHON) should be Python 3.10 to 3.13; say which with: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes and about 5 GB the first time, most of it torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## fine-tune, evaluate and extract on the shipped recordings, offline
	$(BIN)/python -m w2v2nb demo

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

notebooks: $(READY) ## test the notebooks in nbs/
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2

export: $(READY) ## clean the notebooks, export the modules, remake README.md
	$(BIN)/nbdev_clean
	rm -f $(filter-out w2v2nb/__init__.py,$(wildcard w2v2nb/*.py))
	$(BIN)/nbdev_export
	$(BIN)/python tools/parameters.py
	$(BIN)/python tools/readme.py

outputs: $(READY) ## run the notebooks and keep their outputs: make outputs NB=nbs/02_audio.ipynb
	$(BIN)/python tools/outputs.py $(NB)

lint: $(READY) ## ruff over the package, tests and tools
	$(BIN)/ruff check .

wheel: $(READY) ## build dist/*.whl
	$(BIN)/python -m pip wheel --no-deps -w dist .

constraints: ## resolve constraints.txt anew (needs uv)
	python3 tools/constraints.py

bench: $(READY) .bench/ready ## compare speed, memory and error with others: make bench BENCH=--help
	$(BIN)/python tools/bench.py run $(BENCH)

.bench/ready: tools/bench_requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target .bench -r $<
	@touch $@

bench-training: $(READY) ## show what training comes to: make bench-training BENCH=--quick
	$(BIN)/python tools/bench_training.py run $(BENCH)

clean: ## remove what can be made again
	rm -rf $(VENV) .bench dist build w2v2nb-demo *.egg-info .pytest_cache .ruff_cache
