#!/usr/bin/env bash
# Everything that is to be known of revdistill on a GPU, in one run of nine minutes at most: is it right, how fast, how much memory.
#
#   benchmarks/cuda.sh [--device cuda|cpu|standin] [--quick]
#
# A part that fails or runs out of time does not stop the next. The most valuable comes first. Everything found is in two files:
#   $OUT/cuda.jsonl  a JSON line for each measurement, test and part, as soon as it is known   (OUT: benchmarks/results/cuda-run)
#   $OUT/log.txt     what was printed
# PYTHON names the interpreter (python3); nothing need be installed but torch, numpy, numba, h5py, click, scikit-learn and pytest.
# `python benchmarks/report.py` reads benchmarks/results/cuda.jsonl: copy $OUT/cuda.jsonl there to publish it.
set -u

device=cuda quick=""
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device="${2:?--device needs cuda, cpu or standin}"; shift 2 ;;
        --quick) quick=--quick; shift ;;
        *) echo "cuda.sh: unknown option $1; accepted are --device cuda|cpu|standin and --quick" >&2; exit 2 ;;
    esac
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
out="${OUT:-benchmarks/results/cuda-run}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
python="${PYTHON:-python3}"
deadline="${DEADLINE:-540}" # seconds, for all parts together

export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg
export REVDISTILL_DEVICE="$device" REVDISTILL_RESULTS="$out/cuda.jsonl"
[ -n "$quick" ] && export REVDISTILL_STEPS=10
: >"$out/cuda.jsonl"
: >"$out/log.txt"

# part NAME SECONDS COMMAND...: under its own time limit, or what is left; then a line {"part", "exit", "seconds"} (124: out of time).
part() {
    local name="$1" limit="$2" started left code taken
    shift 2
    left=$((deadline - SECONDS))
    if [ "$left" -lt 5 ]; then
        echo "{\"part\": \"$name\", \"skipped\": \"no time was left\"}" >>"$out/cuda.jsonl"
        return
    fi
    [ "$limit" -gt "$left" ] && limit="$left"
    started=$(date +%s%N)
    timeout -k 5 "$limit" "$@" 2>&1 | sed -u "s/^/[$name] /" | tee -a "$out/log.txt"
    code="${PIPESTATUS[0]}"
    taken=$((($(date +%s%N) - started) / 100000000))
    echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((taken / 10)).$((taken % 10))}" >>"$out/cuda.jsonl"
}

measure() { part "$1" "$2" "$python" -m "gpu.$1" --device "$device" $quick; }
tests() { part "$1" "$2" "$python" -m pytest -o addopts=-q -p no:cacheprovider -o faulthandler_timeout=90 "tests/cuda/test_$1.py"; }

measure machine 60
tests primitives 90
# At once: none of them is timed.
measure verify 170 &
tests unrolls 150 &
tests ways_back 150 &
tests surroundings 150 &
measure memory 150 &
measure launches 100 &
wait
measure speed 110
measure capture 60
measure compile 150
echo "done after $SECONDS s: $out/cuda.jsonl" | tee -a "$out/log.txt"
