# Each target makes its own environment; nothing else has to be set up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export NUMBA_CACHE_DIR := $(abspath $(VENV))/numba
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test bench lint clean

demo: $(VENV)/demo
	$(BIN)/perturbcore demo

test: $(VENV)/test
	$(BIN)/pytest

bench: $(VENV)/bench
	$(BIN)/pytest benches --benchmark-json=$(VENV)/bench.json

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist perturbcore.egg-info runs

# One stamp per set of extras: demo needs none.
$(VENV)/demo: EXTRAS :=
$(VENV)/test: EXTRAS := [test]
$(VENV)/bench: EXTRAS := [bench,test]
$(VENV)/dev: EXTRAS := [dev]
$(VENV)/demo $(VENV)/test $(VENV)/bench $(VENV)/dev: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cu csrc/include/*.h) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "perturbcore needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
