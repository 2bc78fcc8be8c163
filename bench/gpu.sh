#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in at most eight minutes: the operators' tests on it, the memory and race checkers
# over small cases, then the benchmark, whose table comes last. Needs Python 3.12, PyTorch 2.11 and Triton 3.6 or newer,
# pytest, and this source tree; nothing is compiled or installed.
#
#   bench/gpu.sh [FOLDER]        results and logs go to FOLDER (default: build/gpu)
#   PROFILE=1 bench/gpu.sh       also traces for chrome://tracing
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=0

step() { # SECONDS NAME COMMAND...: its output goes to a file, of which the end is shown
    local limit=$1 name=$2 begin=$SECONDS status=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    if ((status)); then failed=1; fi
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    tail -n "${SHOWN:-3}" "$out/$name.log"
}

# -p no:cacheprovider: the tree may be read-only. A worker a core compiles the kernels side by side.
step 140 tests "$python" -m pytest -q -p no:cacheprovider -n "$(($(nproc) < 16 ? $(nproc) : 16))" tests/ops tests/model/test_replay.py -k "triton or replay"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 45 $tool compute-sanitizer --tool $tool --error-exitcode 1 "$python" bench/gpu/small.py
    done
else
    echo "== no compute-sanitizer here: memory and races are not checked"
fi
profile=()
if [[ -n ${PROFILE:-} ]]; then profile=(--profile "$out"); fi
step 40 decoding "$python" bench/gpu/decoding.py
SHOWN=40 step 200 operators "$python" bench/gpu/operators.py --out "$out/operators.json" "${profile[@]}"
exit $failed
