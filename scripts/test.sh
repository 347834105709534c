#!/usr/bin/env bash
# Installs the project and its test extra on the first run, then checks style, types and behaviour.
# Arguments go to pytest, for example -m slow, or tests/test_model.py -k batch. Without any, up to
# four processes share the tests, a file at a time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment test
cd "$root"
python="$environment/bin/python"
say "style: ruff check"
"$python" -m ruff check --output-format concise .
say "layout: ruff format --check"
"$python" -m ruff format --check .
say "types: mypy"
"$python" -m mypy
[ $# -gt 0 ] || set -- --numprocesses logical --maxprocesses 4 --dist loadfile
say "tests: pytest $*"
"$python" -m pytest "$@"
