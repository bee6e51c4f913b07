# Two commands for a fresh machine: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint services bench clean

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/s2cd demo --out demo

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process that crashes is not replaced: with --dist loadfile, xdist 3.8 would wait forever for the new one.
test: lint
	$(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0

services: .venv/.installed
	bash tests/services/start.sh

bench: .venv/.installed
	$(BIN)/python -m benchmarks run --short

clean:
	rm -rf .venv demo
