# make demo: environment, a training run on real data, its accuracy matrix.   make test: environment, lint, tests.
# make bench: the library against its peers, as a table (BENCH="--quick" or names: python -m bench --help).
# Variables: PYTHON (3.10 or newer), VENV (where the environment goes), TORCH (what pip installs as PyTorch).
# A smaller PyTorch without CUDA: make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test bench env clean

# The digits' network is too small to be worth sharing among cores, hence one thread. Every run gets a fresh folder.
demo: $(VENV)/.package
	out=runs/split-digits-$$(date +%Y%m%d-%H%M%S)-$$$$ && \
	OMP_NUM_THREADS=1 $(BIN)/hypermask-fast train split-digits --out "$$out" && \
	echo "the matrix as a picture: $$out/accuracy_matrix.png"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --ignore tests/kernels $(PYTEST)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/kernels

bench: $(VENV)/.bench
	$(BIN)/python -m bench $(BENCH)

env: $(VENV)/.package
	$(BIN)/hypermask-fast env

# Runs are kept.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# PyTorch goes first and is then held: what is installed later can never replace it by another build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "Python 3.10 or newer is needed; name one by: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet "setuptools>=77" wheel
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	touch $@

# Without isolation the build sees that PyTorch and compiles the extension; without a compiler it leaves it out.
PIP_EDITABLE = $(BIN)/pip install --quiet --no-build-isolation --constraint $(VENV)/constraints.txt --editable

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP_EDITABLE) .
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP_EDITABLE) ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP_EDITABLE) ".[bench]"
	touch $@
