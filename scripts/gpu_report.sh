#!/usr/bin/env bash
# Everything a GPU can tell of this project, in one command and ten minutes:
#
#     bash scripts/gpu_report.sh OUT                 all of it, the most telling first
#     bash scripts/gpu_report.sh OUT tests           one part in that time: tests, kernels or model
#     MINUTES=25 bash scripts/gpu_report.sh OUT      with more time, all there is
#
# tests.txt     the tests that need a GPU, and the tiny model with every op on Triton
# kernels/      every kernel, tested and then timed beside PyTorch: a CSV for this GPU, and
#               kernels/README.md with its table
# model.json    the whole model beside transformers, and model.png, a picture of it
# summary.txt   which part ended how, and after how long
#
# Each part has a time of its own that a slow one before it cannot take, and keeps what it has when
# that is over. pytest-xdist, where it is installed, shares the tests, which take most of their time
# to compile, among the cores. Without a GPU the same parts run at small shapes, which shows that
# they run; those speeds stand for nothing. PYTHON names the interpreter; default: .venv's,
# else python3.
set -uo pipefail
case "$#${2:-all}" in
    1all | 2tests | 2kernels | 2model) ;;
    *) echo "usage: bash scripts/gpu_report.sh OUT [tests|kernels|model]" >&2; exit 2 ;;
esac
only=${2:-}
minutes=${MINUTES:-10}
case $minutes in
    *[!0-9]* | ??? | 0* | "") echo "error: MINUTES is $minutes; give whole minutes, 1 to 99" >&2; exit 2 ;;
esac
[ "$(uname)" = Linux ] || { echo "error: the report needs Linux" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 # what a part that is killed has printed is all there
[ -n "$only" ] || : > "$out/summary.txt"
failed=0

say() { echo "$1" | tee -a "$out/summary.txt"; }

share() { # PERCENT: seconds for a part, which has all but what starting takes where it is alone
    [ -z "$only" ] && echo $((minutes * 60 * $1 / 100)) || echo $((minutes * 60 * 95 / 100))
}

part() { # NAME SECONDS LOG COMMAND...
    local name=$1 seconds=$2 log=$3 began=$SECONDS code
    shift 3
    [ -z "$only" ] || [ "$only" = "$name" ] || return 0
    sed -i "/^$name: /d" "$out/summary.txt" # of a run before
    timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee "$log"
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
pytest=(-m pytest -q -p no:cacheprovider)
kernels=(kernels/benchmarks/bench.py --results "$out/kernels" --readme "$out/kernels/README.md")
model=(scripts/bench_model.py --grid --json "$out/model.json" --plot "$out/model.png")
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    say "GPU: $("$python" -c "import torch; print(torch.cuda.get_device_name())")"
    # By name: to collect all would import what a machine with a GPU may lack.
    mapfile -t files < <(grep -lE 'mark\.gpu' tests/test_*.py)
    "$python" -c "import xdist" 2> /dev/null && pytest+=(-n 6)
    part tests "$(share 20)" "$out/tests.txt" "$python" "${pytest[@]}" -m "not slow" \
        tests/test_model_on_triton.py "${files[@]}" -k "gpu or test_model_on_triton"
    part kernels "$(share 30)" "$out/kernels.txt" "$python" "${kernels[@]}" \
        --budget $(($(share 30) * 9 / 10))
    part model "$(share 45)" "$out/model.txt" "$python" "${model[@]}" --device cuda \
        --budget $(($(share 45) * 9 / 10))
else
    say "no GPU: the same parts at small shapes; these speeds stand for nothing"
    part tests 140 "$out/tests.txt" "$python" "${pytest[@]}" tests/test_op_gelu.py tests/test_reading.py
    part kernels 190 "$out/kernels.txt" "$python" "${kernels[@]}" --device cpu --quick --ops gelu
    part model 260 "$out/model.txt" "$python" "${model[@]}" --device cpu --shapes tiny --quick \
        --rounds 1 --budget 200
fi
"$python" "${kernels[@]}" --table # also of what a part that was killed has left
exit $failed
