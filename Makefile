# `make demo` and `make test` do everything on a fresh machine, the environment in .venv included.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow runtimes lint docs build clean

demo: $(STAMP)
	$(BIN)/swquant demo

# A worker for each core, with one thread: the tests are many and small.
test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not slow and not gpu"

# With Triton, whose kernels run in its interpreter there.
slow: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,triton,docs]"
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m slow

# Our outputs in the runtimes themselves, which this installs: llama.cpp, onnxruntime, gptqmodel, auto-round, mlx-lm.
runtimes: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m slow tests/runtimes

lint: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/lengths.py

# Warnings are errors; the pages open from build/docs/index.html without a server.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

build: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build

# An interpreter that already has a torch in range lends it to the environment; otherwise pip brings one.
$(STAMP): pyproject.toml constraints.txt tools/torch_in_range.py
	@echo "Installing swquant and what it needs into $(VENV); this takes a few minutes the first time."
	@$(PYTHON) tools/torch_in_range.py && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist
