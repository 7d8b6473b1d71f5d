#!/usr/bin/env bash
# All that needs a GPU. `gpu.sh layer`, in ten minutes: the kernels' tests, the benchmarks of the goals
# and the stages. `gpu.sh volumes`, in four: the 3D network's memory and time, for which there must
# be MONAI. Without a word, both. What was printed and measured is left in OUT. With CHECK=1 a machine
# without a GPU goes through the same steps: tests by Triton's interpreter, quick benchmarks.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_output}
mkdir -p "$OUT"
export PYTHONPATH=src:.
status=0

step() { # name, seconds, command...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.txt" | tail -n 60
    local result=${PIPESTATUS[0]}
    [ "$result" -eq 0 ] || { echo "== $name: exit status $result"; status=1; }
}

PART=${1:-all}
CHECK=${CHECK:-0}
if [ "$PART" != volumes ] && [ "$CHECK" = 1 ]; then
    step machine 60 "$PYTHON" -c "import torch, triton; print(torch.__version__, triton.__version__)"
    step tests 600 "$PYTHON" -m pytest tests/layer/fused/test_gpu.py tests/layer/fused/test_kernels*.py -k "gpu or plain"
    step goals 120 "$PYTHON" -m benchmarks --quick --out "$OUT"
elif [ "$PART" != volumes ]; then
    step machine 20 nvidia-smi
    # Compiling takes most of the tests' time, hence several processes.
    step gpu-tests 190 "$PYTHON" -m pytest tests/layer/fused/test_gpu.py --numprocesses 4
    step goals 150 "$PYTHON" -m benchmarks --shapes goals --out "$OUT/goals"
    step kernel-tests 140 "$PYTHON" -m pytest tests/layer/fused/test_kernels*.py --numprocesses 8
    step stages 80 "$PYTHON" -m benchmarks --shapes stages --rounds 10 --out "$OUT/stages"
fi
if [ "$PART" != layer ] && [ "$CHECK" = 1 ]; then
    step volumes 120 "$PYTHON" -m benchmarks.volumes --quick --rounds 1 --out "$OUT"
elif [ "$PART" != layer ]; then
    step volumes 240 "$PYTHON" -m benchmarks.volumes --rounds 3 --out "$OUT/volumes"
fi
exit "$status"
