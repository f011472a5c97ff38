# The commands of this repository; each sets up its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test laws check

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed ## the main job on the network that the repository ships
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed ## all tests, with some of the cases of each law
	$(BIN)/python -m pytest --numprocesses 2

laws: $(VENV)/.installed ## all tests, with all cases of each law; takes several times as long
	SURGERY_LAWS=1 $(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/.installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
