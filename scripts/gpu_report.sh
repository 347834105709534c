#!/usr/bin/env bash
# Everything a GPU can tell of this project, in one command and inside ten minutes on one H200:
#
#     bash scripts/gpu_report.sh OUT
#
# tests.txt     the tests that need a GPU
# kernels/      every kernel beside PyTorch: a CSV for this GPU, and kernels/README.md with its table
# model.json    the whole model beside transformers, and model.png, a picture of it
# summary.txt   which part ended how, and after how long
#
# Each part has a time of its own that a slow one before it cannot take. Without a GPU the same parts
# run at small shapes, which shows that they run; those speeds stand for nothing. PYTHON names the
# interpreter; default: .venv's, else python3.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/gpu_report.sh OUT" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
: > "$out/summary.txt"
failed=0

say() { echo "$1" | tee -a "$out/summary.txt"; }

part() { # NAME SECONDS LOG COMMAND...
    local name=$1 seconds=$2 log=$3 began=$SECONDS code
    shift 3
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) say "$name: done in $((SECONDS - began)) s" ;;
        124 | 137) say "$name: OUT OF TIME after $seconds s; what it had by then is kept" ;;
        *) say "$name: FAILED with exit code $code after $((SECONDS - began)) s, see $(basename "$log")" ;;
    esac
    [ "$code" -eq 0 ] || failed=1
}

mkdir -p "$out/kernels"
cp kernels/README.md "$out/kernels/README.md"
kernels=(kernels/benchmarks/bench.py --results "$out/kernels" --readme "$out/kernels/README.md")
model=(scripts/bench_model.py --grid --json "$out/model.json" --plot "$out/model.png")
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    say "GPU: $("$python" -c "import torch; print(torch.cuda.get_device_name())")"
    part tests 140 "$out/tests.txt" "$python" -m pytest -q -m "gpu and not slow" tests
    part kernels 190 "$out/kernels.txt" "$python" "${kernels[@]}" --budget 160
    part model 260 "$out/model.txt" "$python" "${model[@]}" --device cuda --budget 220
else
    say "no GPU: the same parts at small shapes; these speeds stand for nothing"
    part tests 140 "$out/tests.txt" "$python" -m pytest -q tests/test_op_gelu.py tests/test_reading.py
    part kernels 190 "$out/kernels.txt" "$python" "${kernels[@]}" --device cpu --quick --ops gelu
    part model 260 "$out/model.txt" "$python" "${model[@]}" --device cpu --shapes tiny --quick \
        --rounds 1 --budget 200
fi
exit $failed
