#!/usr/bin/env bash
# Installs the project on the first run, then lets the model hear clips that ship with it.
# Further arguments go to every command, for example --model Qwen/Qwen2-Audio-7B-Instruct.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment
clips="$root/qwen2audio_core/assets/clips"
qwen2audio="$environment/bin/qwen2audio"
say "speech: \"What does the person say?\" about en_train.flac"
"$qwen2audio" ask "What does the person say?" --audio "$clips/en_train.flac" \
    --greedy --max-new-tokens 24 "$@"
export QWEN2AUDIO_NO_NOTICE=1  # what the small model is was said once
say "voice chat: en_snow.flac asks \"What colour is snow?\", nothing is written"
"$qwen2audio" ask --audio "$clips/en_snow.flac" --greedy --max-new-tokens 24 "$@"
say "sound: \"What is that sound?\" about sound_bell.flac"
"$qwen2audio" ask "What is that sound?" --audio "$clips/sound_bell.flac" \
    --greedy --max-new-tokens 24 "$@"
say "three languages, written down"
for clip in fr:fr_book de:de_coffee zh:zh_weather; do
    "$qwen2audio" transcribe "$clips/${clip#*:}.flac" --language "${clip%%:*}" \
        --greedy --max-new-tokens 24 "$@"
done
