# Each target sets up .venv by itself; running one twice costs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test emulated-gpu lint bench clean

demo: .venv/.ready
	$(BIN)/rnas run --out runs/demo --resume

# By file, because what the tests of a file share is made once.
test: .venv/.ready
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# The tests marked `gpu` where there is none (docs/decisions/012).
emulated-gpu: .venv/.ready
	RNAS_EMULATED_GPU=1 $(BIN)/pytest -m gpu -r s --numprocesses auto --maxprocesses 8

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.ready
	$(BIN)/python -m benchmarks

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
