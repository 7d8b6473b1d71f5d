# Each command sets up all it needs in .venv by itself; PYTHON names the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo3d bench gpu test lint clean

demo: .venv/demo
	$(BIN)/python -m reference_models demo

# Real MRI with simulated acquisitions, from a folder of NIfTI files to a report. One thread: on a
# busy machine two take several times as long, since they wait for each other.
demo3d: export OMP_NUM_THREADS = 1
demo3d: .venv/demo
	rm -rf demo3d_output
	$(BIN)/python -m reference_models example --out demo3d_output/brain
	$(BIN)/python -m reference_models check --data nifti --root demo3d_output/brain
	$(BIN)/python -m reference_models train small3d --root demo3d_output/brain --out demo3d_output/run
	$(BIN)/python -m reference_models evaluate run --run demo3d_output/run
	$(BIN)/python -m reference_models predict --run demo3d_output/run

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
	rm -rf .venv build dist demo_output demo3d_output bench_output gpu_output study_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
