# A fresh machine needs nothing else than Python 3.11+ and make: every target sets up its own .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
EXTRAS ?= record,train,sweep,wan,dev

.PHONY: play test bench lint clean

play: $(VENV)/.player
	$(BIN)/python play.py

test: $(VENV)/.developer
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

bench: $(VENV)/.player
	$(BIN)/python play.py --bench --compile on

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.player: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.developer: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	touch $@ $(VENV)/.player
