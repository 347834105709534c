#!/usr/bin/env bash
# Installs the project and its test extra on the first run, then checks style, types and behaviour.
# Further arguments go to pytest, for example -m slow, or tests/test_model.py -k batch.
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
say "tests: pytest $*"
"$python" -m pytest "$@"
