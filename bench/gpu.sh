#!/usr/bin/env bash
# Builds, tests and measures on a machine with one NVIDIA GPU, in under 10 minutes and without a network.
#
#     bench/gpu.sh                      all phases: build smoke tests ops steps kernels convolutions paths more
#     bench/gpu.sh kernels steps        these alone, on what an earlier call has built
#     bench/gpu.sh build hypernet_adam  anything else is measured: a name that python -m bench --list knows
#
# Needs python3 (or $PYTHON) with torch 2.11 or later, triton and setuptools 77 or later, a C++ compiler and nvcc 12.8
# or later. Where the CUDA sources can't be built, or not even the C++ ones, Triton's kernels are looked at all the same.
# ${OUT:-bench/results/gpu} gets log.txt, results.csv and paths.json, which later calls add to. All phases together have
# $TOTAL. Each can count on a share of it, whatever those before it do, and has besides what these left of theirs; one
# that fails or hangs does not take the others along. Measuring begins with what is wanted most and begins nothing
# new shortly before its limit; what was measured when a limit strikes is kept. At the end the smoke phase's faults come
# first and then one line per phase. The exit status says whether all went well.
#
# Variables: PYTHON, OUT, TOTAL (seconds, 570), HYPERMASK_COMMIT (where the files come without their git history).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
TOTAL=${TOTAL:-570}
LOG=$OUT/log.txt
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
# Compiled kernels are kept for the later phases and calls, outside of the checkout.
cache=${TMPDIR:-/tmp}/hypermask-bench-$(id -u)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
failed="" ended="" smoked=""
# Seconds that a phase can count on: 560 in all, for the last 10 of $TOTAL are the table's. Any other name has 60.
declare -A share=([build]=130 [smoke]=20 [tests]=90 [ops]=50 [steps]=100 [kernels]=60 [convolutions]=70 [paths]=30
    [more]=10)

phase() { # phase NAME COMMAND...: runs it within $LIMIT, logs it, remembers a failure
    local name=$1 limit=$LIMIT began=$SECONDS before
    shift
    if [ "$limit" -lt 5 ]; then
        ended+="== $name: no time left"$'\n'
        failed+=" $name"
        return
    fi
    echo "== $name (at most $limit s)" | tee -a "$LOG"
    before=$(wc -l <"$LOG")
    # An interrupt, not a termination: pytest then tells what has failed so far.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$LOG" 2>&1
    local code=$? outcome=ok
    case $code in
    0) ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="failed, exit $code" ;;
    esac
    ended+="== $name: $outcome after $((SECONDS - began)) s$(said "$before" "^NOTE " | sed 's/^NOTE /; /' | tr -d '\n')"$'\n'
    if [ $code -ne 0 ]; then
        failed+=" $name"
        said "$before" "" | tail -n 15
    fi
    [ "$name" = smoke ] && smoked=$(said "$before" "^SMOKE ")
}

said() { # said LINES PATTERN: what the log holds of PATTERN beyond its first LINES
    tail -n "+$(($1 + 1))" "$LOG" | grep -a "$2"
}

arch=$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "PyTorch sees no GPU" >&2
    exit 1
}
logged=$(cat "$LOG" 2>/dev/null | wc -l) # lines of earlier calls
commit=${HYPERMASK_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo "unknown: set HYPERMASK_COMMIT")}
{
    echo "== $(date -u +%FT%TZ), commit $commit"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
} 2>&1 | tee -a "$LOG"

# Only the architecture that is here, and only the extension: nothing is installed. A line that begins with NOTE goes
# into the phase's outcome. CUDA's half may take all of the time but what the C++ alone needs.
build() {
    trap 'exit 1' INT
    local remove='import pathlib; pathlib.Path("hypermask_fast/_native.abi3.so").unlink(missing_ok=True)'
    $PYTHON -c 'import setuptools as s; v = s.__version__; assert int(v.split(".")[0]) >= 77, v' ||
        echo "NOTE setuptools 77 or later is needed: pip install 'setuptools>=77'"
    HYPERMASK_CUDA=1 HYPERMASK_CUDA_ARCHS=$arch timeout --foreground --signal=INT --kill-after=5 \
        $((LIMIT > 60 ? LIMIT - 30 : LIMIT / 2)) $PYTHON setup.py build_ext --inplace &&
        $PYTHON -m hypermask_fast.env &&
        $PYTHON -c 'from hypermask_fast.ops.registry import problem; why = problem("cuda"); assert not why, why' &&
        return
    echo "NOTE without CUDA's kernels: what follows is Triton's"
    $PYTHON -c "$remove" # it may be of an earlier build, of other sources
    HYPERMASK_CUDA=0 $PYTHON setup.py build_ext --inplace && $PYTHON -m hypermask_fast.env && return 1
    echo "NOTE and without the CPU's"
    $PYTHON -c "$remove"
    return 1
}

smoke() { # whether everything runs and is right, before anything takes its time
    $PYTHON -m bench.smoke
}

tests() { # what has kernels on a GPU, the GPU's own first; tests of what is not installed here skip themselves
    local parallel=() files=() file
    for file in tests/ops tests/test_optim.py tests/training/test_trainer.py; do
        [ -e "$file" ] && files+=("$file")
    done
    # Most of the time goes into compiling kernels, some 600 variants at half a second of one core.
    $PYTHON -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) > 14 ? 14 : $(nproc)))")
    # Emulating CUDA on the CPU needs no GPU, and minutes.
    $PYTHON -m pytest -p no:cacheprovider -p bench.gpu_first --tb=short -rfE --durations=10 --durations-min=5 \
        -k "not emulated" "${parallel[@]}" "${files[@]}"
}

measure() { # measure SECONDS ARGUMENTS...: rows are kept as they come; SECONDS: what starting and a last case take
    local rest=$(($1 < LIMIT / 2 ? $1 : LIMIT / 2))
    shift
    $PYTHON -m bench --device cuda --turns 5 --seconds 0.15 --patience 60 --csv "$OUT/results.csv" \
        --limit $((LIMIT - rest)) "$@"
}

ops() {
    measure 25 hypernet_adam all_tasks mixed_tasks
}

steps() { # six processes that make a step ready, and compile it, take their time
    measure 50 permuted-mnist/task9 split-mnist/task4
}

kernels() {
    measure 20 masked_linear chunk_masked_linear
}

convolutions() { # 60 cases, so each of them briefly
    measure 20 masked_conv2d/forward masked_conv2d/both --turns 3 --seconds 0.03
}

paths() { # the table by which layers choose their path; worth keeping as hypermask_fast/tables/GPU.json
    $PYTHON -m bench.paths --seconds $((LIMIT > 60 ? LIMIT - 30 : LIMIT / 2)) --out "$OUT/paths.json"
}

more() { # what no target is set for
    measure 50 thresholds masked_weights weight_drift output_drift resnet20-k2/task9 permuted-mnist-chunked/task9 \
        permuted-mnist/task0
}

# `timeout` starts programs, not functions.
export -f build smoke tests measure ops steps kernels convolutions paths more
export PYTHON OUT LIMIT arch

[ $# -gt 0 ] || set -- build smoke tests ops steps kernels convolutions paths more
while [ $# -gt 0 ]; do
    name=$1
    shift
    LIMIT=$((TOTAL - SECONDS - 10))
    for later in "$@"; do LIMIT=$((LIMIT - ${share[$later]:-60})); done
    case $name in
    build | smoke | tests | ops | steps | kernels | convolutions | paths | more) phase "$name" bash -c "$name" ;;
    *) phase "$name" bash -c 'measure 20 "$1"' measure "$name" ;;
    esac
done

echo
[ -n "$smoked" ] && echo "$smoked"
said "$logged" "^FAILED\|^ERROR\|is left out\|WRONG\|not run\|not begun\|us per node"
printf '%s' "$ended" | tee -a "$LOG"
[ -s "$OUT/results.csv" ] && "$PYTHON" -m bench.table "$OUT/results.csv"
if [ -n "$failed" ]; then
    echo "failed:$failed (see $LOG)"
    exit 1
fi
