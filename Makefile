# `make quickstart` and `make test` do everything themselves on a machine with Python 3.10 or newer and a network to PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE  # two processes would compile all tests each time
READY := $(VENV)/.ready

.PHONY: setup quickstart test test-slow test-all check bench clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,quant]"
	$(BIN)/python -c "import matplotlib.figure, matplotlib.font_manager"
	touch $(READY)

# Resumes an unfinished run; on a finished one it shows before and after again.
quickstart: setup
	$(BIN)/glmtune train examples/identity/run.yaml --resume

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# As many slow tests as fit into BUDGET seconds, each day in another order; what is left out is no failure. `timeout` ends what hangs.
BUDGET ?= 1200
test-slow: setup
	timeout --preserve-status --foreground -s INT -k 60 $$(($(BUDGET) + 300)) \
		$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --budget $(BUDGET)

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/sft_cpu.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis *.egg-info
