#!/usr/bin/env bash
# Builds, tests and measures on a machine with one NVIDIA GPU, in under 10 minutes and without a network.
#
# Needs python3 (or $PYTHON) with torch 2.11 or later and triton, a C++ compiler and nvcc 12.8 or later.
# Everything is written to ${OUT:-bench/results/gpu}. Each phase has a time limit of its own, so that one that fails
# or hangs does not take the others along, and all together have $TOTAL; results are kept row by row. The exit status
# says whether all phases went well.
#
# Variables: PYTHON, OUT, TOTAL (seconds, 570), BENCH_NAMES (what to measure in place of everything).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
TOTAL=${TOTAL:-570}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
# Compiled kernels are kept for the later phases of this run, outside of the checkout.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/hypermask-bench-$$/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/hypermask-bench-$$/inductor}
failed=""

phase() { # phase NAME SECONDS COMMAND...: runs it with a limit, logs it, remembers a failure
    local name=$1 limit=$2 began=$SECONDS left=$((TOTAL - SECONDS - 10))
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left" | tee -a "$OUT/phases.txt"
        failed="$failed $name"
        return
    fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    echo "== $name: exit $code after $((SECONDS - began)) s" | tee -a "$OUT/phases.txt"
    if [ $code -ne 0 ]; then
        failed="$failed $name"
        tail -n 15 "$OUT/$name.log"
    fi
}

: >"$OUT/phases.txt"
arch=$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "PyTorch sees no GPU" >&2
    exit 1
}

# Only the architecture that is here, and only the extension: nothing is installed.
build() {
    HYPERMASK_CUDA=1 HYPERMASK_CUDA_ARCHS=$arch $PYTHON setup.py build_ext --inplace &&
        $PYTHON -m hypermask_fast.env &&
        $PYTHON -c 'from hypermask_fast import backends; why = backends.problem("cuda"); assert not why, why'
}

tests() { # what has kernels on a GPU; tests of what is not installed here skip themselves
    local parallel=() paths=() path
    for path in tests/ops tests/kernels tests/test_optim.py tests/training/test_trainer.py; do
        [ -e "$path" ] && paths+=("$path")
    done
    $PYTHON -c 'import xdist' 2>/dev/null && parallel=(-n 6)
    # Compiling for other architectures and for a CPU needs no GPU, and minutes.
    local skipped=(tests/kernels/test_offline.py tests/ops/test_cuda_build.py tests/ops/test_cuda_emulated.py
        tests/ops/test_small_batch.py)
    $PYTHON -m pytest -p no:cacheprovider "${skipped[@]/#/--ignore=}" "${parallel[@]}" "${paths[@]}"
}

measure() { # a file of results for each group; what was measured before a limit strikes is kept
    $PYTHON -m bench --device cuda --turns 5 --seconds 0.15 --csv "$OUT/results.csv" "$@"
}

# `timeout` starts programs, not functions.
export -f build tests measure
export PYTHON OUT arch

phase build 120 bash -c build
phase tests 160 bash -c tests
rm -f "$OUT/results.csv"
if [ -n "${BENCH_NAMES:-}" ]; then
    # shellcheck disable=SC2086 # several names
    phase bench "$TOTAL" bash -c 'measure "$@"' measure $BENCH_NAMES
else
    phase bench-ops 60 bash -c 'measure "$@"' measure hypernet_adam thresholds masked_weights weight_drift output_drift \
        all_tasks mixed_tasks
    phase bench-kernels 130 bash -c 'measure "$@"' measure masked_linear chunk_masked_linear masked_conv2d
    # The table by which layers choose their path; worth keeping as hypermask_fast/tables/GPU.json.
    phase dispatch 100 "$PYTHON" -m bench.dispatch --seconds 85 --out "$OUT/dispatch.json"
    # The slowest to get ready last: it alone is lost when time runs out.
    phase bench-steps "$TOTAL" bash -c 'measure "$@"' measure split-mnist/task4 permuted-mnist/task9 \
        permuted-mnist/task0 permuted-mnist-chunked/task9 resnet20-k2/task9
fi
[ -s "$OUT/results.csv" ] && phase plots 30 "$PYTHON" -m bench.plots "$OUT/results.csv"

echo
[ -f "$OUT/tests.log" ] && tail -n 1 "$OUT/tests.log"
cat "$OUT/phases.txt"
grep -h "is left out\|WRONG\|not run" "$OUT"/bench*.log 2>/dev/null
[ -s "$OUT/results.csv" ] && "$PYTHON" -m bench.table "$OUT/results.csv"
if [ -n "$failed" ]; then
    echo "failed:$failed (logs in $OUT)"
    exit 1
fi
