# `make help` lists what there is. Variables: PYTHON (3.10 or newer), VENV (where the environment goes), TORCH (what pip
# installs as PyTorch). A smaller PyTorch without CUDA:
#     make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= 3.6.0
BIN = $(VENV)/bin
# Python compiles a package's modules when they are imported first; most of them never are. It must then be let keep what
# it has compiled, whatever the caller's environment says: else each process of the tests compiles PyTorch's again.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/pip install --quiet --no-compile
# One more than there are processors: some tests mostly wait, for processes of their own.
WORKERS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))

.PHONY: help demo test lint docs bench microbench test-triton test-integrations compile_commands env clean

help:
	@echo "make demo              environment; trains on real digits (no download), a minute; the accuracy matrix"
	@echo "make test              environment; lint, types, import rules and all tests, some minutes"
	@echo "make lint              the same without the tests"
	@echo "make docs              the documentation as a website, build/docs/index.html; warnings are errors"
	@echo "make bench             the library against its peers (BENCH=\"--quick\" or names: python -m bench --help)"
	@echo "make microbench        every op and layer by itself, under 3 minutes (MICRO=\"-k linear\" for a part)"
	@echo "make test-triton       the Triton kernels with another Triton, in an environment of its own (TRITON=3.6.0)"
	@echo "make test-integrations the Avalanche adapter, in an environment of its own, with torchvision and Avalanche"
	@echo "make compile_commands  compile_commands.json for editors, from the last build of csrc/"
	@echo "make env               environment; what this installation is and sees"
	@echo "make clean             all of that away again; runs are kept"
	@echo
	@echo "The first of these makes the environment. PyTorch is downloaded: gigabytes with CUDA, so as long as your connection"
	@echo "takes for these; README.md has a smaller one. Then csrc/ is compiled: a minute or two, some more with nvcc."
	@echo "pip says nothing meanwhile. After that the command is"
	@echo "    $(BIN)/hypermask-fast     or, once you have typed source $(BIN)/activate, hypermask-fast"

# The digits' network is too small to be worth sharing among cores, hence one thread. Every run gets a fresh folder.
demo: $(VENV)/.package
	@out=runs/split-digits-$$(date +%Y%m%d-%H%M%S)-$$$$ && \
	OMP_NUM_THREADS=1 $(BIN)/hypermask-fast train split-digits --out "$$out" && \
	echo "the matrix as a picture: $$out/accuracy_matrix.png" && \
	echo "the command: $(BIN)/hypermask-fast --help     or, once you have typed source $(BIN)/activate, hypermask-fast" && \
	echo "such as:     $(BIN)/hypermask-fast evaluate $$out"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.h')
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright -p pyproject.toml --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --builder html docs build/docs
	@echo "open build/docs/index.html"

bench: $(VENV)/.bench
	$(BIN)/python -m bench $(BENCH)

microbench: $(VENV)/.bench
	$(BIN)/python -m pytest bench/micro --benchmark-only $(MICRO)

# Triton 3.6's interpreter needs a numpy before 2.4.
test-triton:
	$(MAKE) VENV=$(VENV)-triton-$(TRITON) $(VENV)-triton-$(TRITON)/.test
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet --no-deps "triton==$(TRITON)" $(if $(filter 3.6.%,$(TRITON)),"numpy<2.4")
	OMP_NUM_THREADS=1 $(VENV)-triton-$(TRITON)/bin/python -m pytest -n auto --dist worksteal -k "triton or offline" tests/offline tests/ops $(PYTEST)

# TORCH="torch==2.14.1 torchvision==0.29.1" names a torchvision that goes with the PyTorch.
test-integrations:
	$(MAKE) VENV=$(VENV)-integrations $(VENV)-integrations/.integrations
	OMP_NUM_THREADS=1 $(VENV)-integrations/bin/python -m pytest tests/integrations $(PYTEST)

# Where BuildExtension lets ninja compile; the flags are those of the environment's own build.
compile_commands: $(VENV)/.test
	for folder in build/temp.*; do $(BIN)/ninja -C "$$folder" -t compdb > compile_commands.json; done

env: $(VENV)/.package
	$(BIN)/hypermask-fast env

# Runs are kept.
clean:
	rm -rf $(VENV) $(VENV)-triton-* $(VENV)-integrations build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f compile_commands.json
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# PyTorch goes first and is then held: what is installed later can never replace it by another build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "Python 3.10 or newer is needed; name one by: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch; pip is silent while it downloads gigabytes (README.md: a smaller one), which can take many minutes"
	$(PIP) $(TORCH)
	$(PIP) "setuptools>=77" wheel ninja
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	touch $@

# Without isolation the build sees that PyTorch and compiles the extension; without a compiler it leaves it out.
PIP_EDITABLE = $(PIP) --no-build-isolation --constraint $(VENV)/constraints.txt --editable

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@echo "installing what training needs and compiling csrc/; silent for a minute or two, some more where nvcc is there"
	$(PIP_EDITABLE) ".[train]"
	touch $@

# What training needs is among it: one installation, not two.
$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	@echo "installing what the tests need and compiling csrc/; silent for some minutes"
	$(PIP_EDITABLE) ".[test]"
	touch $(VENV)/.package $@

$(VENV)/.bench: $(VENV)/.package
	@echo "installing what the benchmarks need; silent for a minute or so"
	$(PIP_EDITABLE) ".[bench]"
	touch $@

$(VENV)/.docs: $(VENV)/.package
	@echo "installing what the documentation needs; silent for a minute or so"
	$(PIP_EDITABLE) ".[docs]"
	touch $@

$(VENV)/.integrations: $(VENV)/.package
	@echo "installing Avalanche; silent for a minute or so"
	$(PIP_EDITABLE) ".[avalanche]" pytest
	touch $@
