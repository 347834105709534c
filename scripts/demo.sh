#!/usr/bin/env bash
# Installs the project on the first run, then asks the model about a clip that ships with it.
# Further arguments go to `qwen2audio ask`, for example --model Qwen/Qwen2-Audio-7B-Instruct.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment
clip="$root/qwen2audio_core/assets/clips/en_capital.flac"
say "asking about $clip"
"$environment/bin/qwen2audio" ask --audio "$clip" "What does the person ask?" \
    --greedy --max-new-tokens 24 "$@"
