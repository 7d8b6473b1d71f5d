# Each command sets up all it needs in .venv by itself; PYTHON names the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/demo
	$(BIN)/python -m reference_models.demo

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[reference]'
	touch $@

.venv/test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[reference,test]'
	touch $@

clean:
	rm -rf .venv build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
