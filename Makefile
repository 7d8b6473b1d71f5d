# Each command sets up all it needs in .venv by itself; PYTHON names the interpreter to make it with.
VENV := .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN = $(VENV)/Scripts
else
PYTHON ?= python3
BIN = $(VENV)/bin
endif

.PHONY: demo demo3d bench docs gpu test slow lint resolve versions wheel nnunet clean

demo: .venv/demo
	$(BIN)/python -m reference_models demo

# Real MRI with simulated acquisitions, from a folder of NIfTI files to a report. One thread: on a
# busy machine two take several times as long, since they wait for each other.
demo3d: export OMP_NUM_THREADS = 1
demo3d: .venv/demo
	rm -rf demo3d_output
	$(BIN)/python -m reference_models example --out demo3d_output/brain
	$(BIN)/python -m reference_models check --data folder --root demo3d_output/brain
	$(BIN)/python -m reference_models train small3d --root demo3d_output/brain --out demo3d_output/run
	$(BIN)/python -m reference_models evaluate run --run demo3d_output/run
	$(BIN)/python -m reference_models predict --run demo3d_output/run

bench: .venv/bench
	$(BIN)/python -m benchmarks

# With PYTHON's own packages, since those fit the GPU: the kernels' tests, then the benchmarks.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh first
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh second

# One thread a process: the tests are small, and as many of them run at once as there are cores. Who
# is done takes over tests that wait for another process: those of the kernels are long.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout 180 --numprocesses auto --dist worksteal

# What takes minutes: kernels of every dtype, compiled for five GPUs; ONNX files of larger networks.
slow: .venv/test
	$(BIN)/python -m pytest -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The pages of docs/ as a site, in site/. A broken link is an error, and so is a public name without a
# docstring. As a module of Python, MkDocs finds the packages of this folder.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/test
	$(BIN)/python -m mkdocs build

# Whether every extra can be installed on every system and Python that is claimed.
resolve: .venv/test
	$(BIN)/python .ci/resolve.py

# The core's tests with another Python and PyTorch, in an environment of their own, and with a NumPy
# that the interpreters of older Tritons take.
versions: VENV := .venv-torch$(strip $(TORCH))
versions:
	test -n "$(strip $(TORCH))" || { echo "Say which: make versions PYTHON=python3.10 TORCH=2.8.0"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	grep -vE '^(torch|triton|numpy)[=<]' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --no-compile --constraint $(VENV)/constraints.txt torch==$(strip $(TORCH)) 'numpy<2.4' --editable '.[reference,test]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto src tests/layer

# What a release publishes, in dist/, and the tests of the layer with the wheel, in an environment of
# their own that holds no link to these sources.
wheel: VENV := .venv-wheel
wheel:
	rm -rf dist
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt build
	$(BIN)/python -m build
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt "$$(echo dist/*.whl)[reference,test]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto tests/layer

# The tests of nnU-Net's trainers, in an environment of their own: nnU-Net brings fifty packages more.
nnunet: VENV := .venv-nnunet
nnunet:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[nnunet,test]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reference/nnunet

# A half-made environment has no pip that runs, and is completed. Most modules of what is installed
# are never imported: compiling all of them took half of the time.
.venv/demo: EXTRAS := reference
.venv/bench: EXTRAS := bench
.venv/test: EXTRAS := reference,test
.venv/demo .venv/bench .venv/test: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv .venv-torch* .venv-wheel .venv-nnunet build dist demo_output demo3d_output bench_output gpu_output study_output site .pytest_cache .import_linter_cache .mypy_cache .ruff_cache .hypothesis
