#!/bin/sh
# All that is to be measured on one H200, in under ten minutes: the tests that need a GPU, then each benchmark in a box of
# its own, the most telling first. Needs PyTorch 2.11 or later, NumPy and pytest.
#
#     sh benchmarks/gpu.sh [OUT] [CHECKOUT]
#
# OUT, a folder, gets the results as they come, and a log; CHECKOUT is one of the reference, without which there are no
# ratios to it. What fails or takes too long leaves the others alone.
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results} checkout=${2:+--reference $2}
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1

box() { # seconds, name, command: what it prints goes to the log as well
    seconds=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tail -n 60
    for file in benchmarks/results/*_cuda*.json; do
        if [ -e "$file" ] && [ ! "$file" -ef "$out/$(basename "$file")" ]; then cp "$file" "$out"; fi
    done
}

{
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv
    box 120 tests python3 -m pytest --noconftest -q -x --maxfail=5 -p no:cacheprovider tests/test_capture_on_gpu.py
    # shellcheck disable=SC2086 # one word or none
    box 150 step python3 benchmarks/step.py --device cuda $checkout --rounds 4 --net wrn28-2,wrn28-10,preact18-1,preact18-2,preact18-3
    box 70 slots python3 benchmarks/slots.py --device cuda --precision bf16 --net wrn28-2,wrn28-1 --slots 1,2,4,8,16 --rounds 4
    box 30 start python3 benchmarks/start.py --device cuda --net wrn28-1,wrn28-2 --rounds 2
    box 40 evaluation python3 benchmarks/evaluation.py --device cuda --precision bf16 --rounds 3
    box 150 compiled python3 benchmarks/step.py --device cuda --rounds 3 --net wrn28-2,wrn28-10 --variants default,compiled --into step_cuda_compiled
} 2>&1 | tee "$out/gpu.log"
