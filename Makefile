# The commands of this repository; each sets up its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST ?= # more options for pytest
export PYTHONDONTWRITEBYTECODE := # tests start many processes, which load compiled sources faster
SMOKE := tests/test_house.py tests/test_algebra.py tests/test_graphs.py -k "house or conv2d-3x3 or (laws and (resnet-basic or mlp))"

.PHONY: demo smoke test laws check

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed ## the main job on the network that the repository ships
	$(BIN)/python examples/demo.py

smoke: $(VENV)/.installed ## in half a minute: the order of the house, and a few cases and networks through everything
	$(BIN)/python -m pytest --numprocesses 2 $(SMOKE) $(PYTEST)

test: $(VENV)/.installed ## all tests, with a covering choice of what crosses networks, kinds and methods
	$(BIN)/python -m pytest --numprocesses 2 $(PYTEST)

laws: $(VENV)/.installed ## all tests, with all combinations; takes several times as long
	SURGERY_LAWS=1 $(BIN)/python -m pytest --numprocesses 2 $(PYTEST)

check: $(VENV)/.installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
