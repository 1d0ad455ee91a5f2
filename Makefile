# Every target sets up what it needs in .venv. It takes Python 3.11 or newer and, the first time, a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# cpu or cuda. On Linux torch's build on PyPI brings gigabytes of CUDA libraries, so the CPU build is installed unless
# `make clean demo TORCH=cuda` asks for the other one.
TORCH ?= cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: demo test check train-gpu docs lint style types all-tests quick-tests install clean

demo: $(VENV)/.demo
	$(BIN)/dlm generate "ROMEO:" --compare words,words-uniform --steps 64 --watch
	@echo
	@echo "Type next (or put dlm on your path with: source $(BIN)/activate):"
	@echo
	@echo '  $(BIN)/dlm generate "JULIET:" --length 400 --watch     # watch another text settle'
	@echo '  $(BIN)/dlm generate --template "ROMEO: ____ is my ____, JULIET"'
	@echo '  $(BIN)/dlm list                                        # models, recipes and data sets'
	@echo '  $(BIN)/dlm --help                                      # every command'

# Everything: lint, types, all tests. mypy has one thread, so the tests run beside it.
test: style
	$(MAKE) --no-print-directory -j 2 types all-tests

# For daily work: lint, types and the tests that take under three seconds each.
check: style
	$(MAKE) --no-print-directory -j 2 types quick-tests

# Every recipe of Shakespeare at 10.7M parameters; needs one GPU (make install TORCH=cuda) and resumes.
train-gpu: $(VENV)/.demo
	$(BIN)/python dev/train_bundled.py --out runs/large --large

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: style types

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

all-tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

quick-tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m "not slow and not browser and not network"

install: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'dlm needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)

# First the places that pip knows, then PyTorch's index; a mirror without CPU builds, and macOS, whose build is one, take what pip finds.
$(VENV)/.torch: constraints.txt | $(BIN)/python
ifeq ($(TORCH)-$(shell uname -s),cpu-Linux)
	@echo "Installing PyTorch's CPU build, torch $(TORCH_VERSION)+cpu (TORCH=cuda: the build for GPUs, some gigabytes) ..."
	$(PIP) torch==$(TORCH_VERSION)+cpu 2> /dev/null \
		|| $(PIP) --retries 1 --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH_VERSION)+cpu || $(PIP) torch
else
	@echo "Installing torch $(TORCH_VERSION) as the package index has it ..."
	$(PIP) torch
endif
	@$(BIN)/python -c "from importlib.metadata import version; print('Installed torch', version('torch'))"
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing dlm and what it needs ..."
	$(PIP) --editable .
	@touch $@

# pip compiles on one core what compileall does on all.
$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) --no-compile --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages bring templates that are no Python
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
