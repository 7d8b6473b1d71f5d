#!/usr/bin/env bash
# Runs what needs a GPU, in two calls of limited length, for a GPU that is rented by the minute.
#   gpu.sh first    seven minutes at most: the correctness tests, the goals, and a sweep of the
#                   worst launches
#   gpu.sh second   three minutes and twenty seconds, with the sweep's winners in the code: the
#                   correctness tests, the goals, and the 3D network, which needs MONAI
# Each call leaves one file in OUT, with all that was printed and measured. The file is renewed every
# few seconds, so that little is lost if the call is killed. Python also finds packages in the folders
# that PYTHONPATH names.
set -u
cd "$(dirname "$0")/.."
CALL=${1:-}
case $CALL in
    first | second) ;;
    *) echo "gpu.sh: got '$CALL', expected first or second." >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_output}
FILES=$(mktemp -d)
mkdir -p "$OUT"
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
status=0

save() { # written whole, and then named; tar's status is 1 if a file grows meanwhile
    local part=$OUT/.$CALL.$BASHPID
    tar czf "$part" -C "$FILES" .
    [ $? -le 1 ] && mv "$part" "$OUT/$CALL.tar.gz"
}

for ((i = 0; i < 120; i++)); do # ten minutes at most, even where nobody notes that the call is dead
    sleep 5
    save
    kill -0 $$ || break
done > "$FILES/saver.log" 2>&1 &
saver=$!
trap 'kill "$saver"; save; rm -rf "$FILES" "$OUT/.$CALL".*' EXIT

goal_lines() { # the goals in what is read, each once, as soon as it is there
    local line goals=
    local -A seen
    while IFS= read -r line; do
        case $line in
            "### Goals"*) goals=1 ;;
            "### "*) goals= ;;
            "|"*) [ "$goals" ] && [ ! "${seen[$line]:-}" ] && seen[$line]=1 && echo "${line:0:160}" ;;
        esac
    done
}

box() { # name, seconds, lines to print, command...
    local name=$1 seconds=$2 lines=$3 began=$SECONDS result
    shift 3
    echo "== $name, $seconds s at most"
    if [ "$name" = goals ]; then # printed after each shape
        timeout --kill-after 2 "$seconds" "$@" 2>&1 | tee "$FILES/$name.txt" | goal_lines
        result=${PIPESTATUS[0]}
    else
        timeout --kill-after 2 "$seconds" "$@" > "$FILES/$name.txt" 2>&1
        result=$?
    fi
    tail -n "$lines" "$FILES/$name.txt" | cut -c 1-160
    echo "== $name: exit status $result, $((SECONDS - began)) of $seconds s, $SECONDS s in all"
    [ "$result" -eq 0 ] || status=1
    return "$result"
}

last_goals() {
    echo "== goals"
    goal_lines < "$FILES/goals.txt"
}

right() { # seconds, which tests: none that fails is timed
    box correctness "$1" 15 "$PYTHON" -m pytest tests/layer/fused -p no:cacheprovider \
        --ignore tests/layer/fused/test_compiled_kernels.py \
        --ignore tests/layer/fused/test_kernels_loops.py --maxfail 5 \
        --numprocesses 14 --dist worksteal ${2:+-k "$2"} || exit 1
}

box machine 14 6 "$PYTHON" -c "
import subprocess, torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_name())
subprocess.run(['nvidia-smi', '-L'])" || exit 1
if [ "$CALL" = first ]; then
    box prewarm 50 6 "$PYTHON" -m benchmarks.kernels prewarm
    right 170
    box goals 108 1 "$PYTHON" -m benchmarks --shapes goals --rounds 10 --out "$FILES/goals"
    for shape in stage-0 stage-0-wide 2d; do
        box "sweep-$shape" 20 9 "$PYTHON" -m benchmarks.kernels sweep "$shape" --out "$FILES"
    done
else
    box prewarm 36 6 "$PYTHON" -m benchmarks.kernels prewarm --own
    right 55 "gpu"
    box goals 55 1 "$PYTHON" -m benchmarks --shapes goals --rounds 20 --out "$FILES/goals" \
        --providers triton,mask-loop,gemm-loop,grouped-mm,dense
    if "$PYTHON" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('monai'))"; then
        box volumes 30 12 "$PYTHON" -m benchmarks.volumes --patches 1x192x192x96 --rounds 3 \
            --networks dense,mask-loop,ours --dtype bfloat16 --out "$FILES/volumes"
    else
        echo "== volumes: left out, since MONAI is not installed"
    fi
fi
last_goals
exit "$status"
