# Each command sets up all it needs in .venv by itself; PYTHON names the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo bench gpu test lint clean

demo: .venv/demo
	$(BIN)/python -m reference_models demo

bench: .venv/bench
	$(BIN)/python -m benchmarks

# With PYTHON's own packages, since those fit the GPU: the kernels' tests, then the benchmarks.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh

# One thread a process: the tests are small, and as many of them run at once as there are cores.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A half-made environment has no pip, and is made again.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[reference]'
	touch $@

.venv/bench: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bench]'
	touch $@

.venv/test: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[reference,test]'
	touch $@

clean:
	rm -rf .venv build dist demo_output bench_output gpu_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
