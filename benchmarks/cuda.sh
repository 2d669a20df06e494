#!/usr/bin/env bash
# Everything that is to be known of revdistill on a GPU, in one run of nine minutes at most: is it right, how fast, how much memory.
#
#   benchmarks/cuda.sh [--device cuda|cpu|standin] [--quick] [--only NAME[=SECONDS],NAME[=SECONDS],...]
#
# A part that fails or runs out of time does not stop the next. The most valuable comes first. Everything found is in two files:
#   $OUT/cuda.jsonl  a JSON line for each measurement, test and part, as soon as it is known   (OUT: benchmarks/results/cuda-run)
#   $OUT/log.txt     what was printed
# --only: these parts, in the order below, with limits of their own; `machine` always runs. DEADLINE: seconds for all together (540).
# PYTHON names the interpreter (python3); nothing need be installed but torch, numpy, numba, h5py, click, scikit-learn and pytest.
# COMMIT names what is measured where there is no git to ask.
# `python benchmarks/report.py` reads benchmarks/results/cuda.jsonl: copy $OUT/cuda.jsonl there to publish it.
set -u

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1

suites=()
for file in tests/cuda/test_*.py; do
    file="${file##*/test_}"
    suites+=("${file%.py}")
done
names=(machine "${suites[@]}" verify memory launches long speed kernels gpt2 capture compile)

device=cuda quick="" only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device="${2:?--device needs cuda, cpu or standin}"; shift 2 ;;
        --quick) quick=--quick; shift ;;
        --only) only="${2:?--only needs names of parts: ${names[*]}}"; shift 2 ;;
        *) echo "cuda.sh: unknown option $1; accepted are --device cuda|cpu|standin, --quick and --only NAME,NAME=SECONDS" >&2; exit 2 ;;
    esac
done
declare -A chosen=([machine]="") # part -> its limit, where one was given
for choice in ${only//,/ }; do
    name="${choice%%=*}" seconds=""
    [[ "$choice" == *=* ]] && seconds="${choice#*=}"
    if [[ " ${names[*]} " != *" $name "* ]]; then
        echo "cuda.sh: --only $name: there is no such part; there are ${names[*]}" >&2
        exit 2
    fi
    if [[ "$choice" == *=* && ! "$seconds" =~ ^[1-9][0-9]*$ ]]; then
        echo "cuda.sh: --only $choice: after = there must be a number of seconds, at least 1" >&2
        exit 2
    fi
    chosen[$name]="$seconds"
done

out="${OUT:-benchmarks/results/cuda-run}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
python="${PYTHON:-python3}"
deadline="${DEADLINE:-540}"

export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # to ask whether there is a GPU starts nothing that a copied process could not start again
export REVDISTILL_DEVICE="$device" REVDISTILL_RESULTS="$out/cuda.jsonl"
export REVDISTILL_COMMIT="${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
[ -n "$quick" ] && export REVDISTILL_STEPS=10
: >"$out/cuda.jsonl"
: >"$out/log.txt"

# part NAME SECONDS COMMAND...: under its own time limit, or what is left; then a line {"part", "exit", "seconds"} (124: out of time).
# REVDISTILL_UNTIL tells the command when it will be ended.
part() {
    local name="$1" limit="$2" started left code taken
    shift 2
    [ -z "$only" ] || [ -n "${chosen[$name]+chosen}" ] || return
    limit="${chosen[$name]:-$limit}"
    left=$((deadline - SECONDS))
    if [ "$left" -lt 5 ]; then
        echo "{\"part\": \"$name\", \"skipped\": \"no time was left\"}" >>"$out/cuda.jsonl"
        return
    fi
    [ "$limit" -gt "$left" ] && limit="$left"
    started=$(date +%s%N)
    REVDISTILL_UNTIL=$(($(date +%s) + limit)) timeout -k 5 "$limit" "$@" 2>&1 | sed -u "s/^/[$name] /" | tee -a "$out/log.txt"
    code="${PIPESTATUS[0]}"
    taken=$((($(date +%s%N) - started) / 100000000))
    echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((taken / 10)).$((taken % 10))}" >>"$out/cuda.jsonl"
}

measure() { part "$1" "$2" "$python" -m "gpu.$1" --device "$device" $quick; }
workers="" # of pytest-xdist, where there is one
[ "$device" = cuda ] && "$python" -c "import xdist" 2>/dev/null && workers="-n 2 -p no:benchmark"
tests() {
    # shellcheck disable=SC2086
    part "$1" "$2" "$python" -m pytest -o addopts=-q -p no:cacheprovider -o faulthandler_timeout=90 $workers "tests/cuda/test_$1.py"
}

measure machine 60
# At once: none of them is timed.
for suite in "${suites[@]}"; do
    tests "$suite" 150 &
done
measure verify 170 &
measure memory 150 &
measure launches 100 &
measure long 170 & # its seconds are those of beside all these
wait
# Alone: these are.
measure speed 140
measure kernels 60
measure gpt2 90
measure capture 40
measure compile 100
echo "done after $SECONDS s: $out/cuda.jsonl" | tee -a "$out/log.txt"
