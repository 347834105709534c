#!/usr/bin/env bash
# Makes the small model from nothing: data, three stages of training, and what each has achieved.
#
#     bash scripts/train_tiny.sh [DIR]        default: tiny-run
#
# Every part goes on where it was broken off. Needs espeak-ng, flite and festival with its voice
# festvox-us-slt-hts. PRETRAIN_MINUTES (90),
# SFT_MINUTES (30) and DPO_MINUTES (5) say how long the stages may take: the learning rate falls to
# zero by then, so more minutes or a faster machine make a better model. The data comes before that.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment test
out="${1:-tiny-run}"
data="$out/data"
python="$environment/bin/python"
train=("$environment/bin/qwen2audio" train --batch-seconds 48 --weight-decay 0.05
    --save-every 200 --eval-every 400 --eval-rows 96)
mkdir -p "$out"

say "data: $data"
"$python" "$root/scripts/make_tiny_data.py" --out "$data"
[ -d "$out/begin" ] || "$python" "$root/scripts/make_tiny_model.py" "$data/texts.txt" "$out/begin" \
    --encoder-layers 4 --decoder-layers 3

# An encoder that hears nothing yet gives the decoder nothing to learn from: it is first told which
# sound of speech is in each frame, alone, then beside the texts; and half of the heads of the upper
# decoder layers where in the clip the next token of a transcript is said.
say "pretraining"
"${train[@]}" "$data/pretrain.jsonl" "$data/words.jsonl" --stage pretrain \
    --model "$out/begin" --out "$out/pretrain" --valid "$data/valid-pretrain.jsonl" \
    --minutes "${PRETRAIN_MINUTES:-90}" --lr 1e-3 --batch-tokens 3000 --sounds "$data/phones.jsonl" --listen-steps 250 \
    --ctc-weight 0.3 --attend-weight 0.5 --auxiliary-until 0.95

say "fine-tuning"
"${train[@]}" "$data/sft.jsonl" "$data/pretrain.jsonl@0.3" "$data/words.jsonl@0.2" \
    --stage sft --model "$out/pretrain/model" --out "$out/sft" --valid "$data/valid-sft.jsonl" \
    --minutes "${SFT_MINUTES:-30}" --lr 7e-4 --warmup 50 --batch-tokens 3600 \
    --sounds "$data/phones.jsonl" --sounds-weight 0.5 --attend-weight 0.3 --auxiliary-until 0.95

say "preference"
[ -f "$out/pairs.jsonl" ] || "$python" "$root/scripts/make_tiny_pairs.py" \
    --model "$out/sft/model" --data "$data" --out "$out/pairs.jsonl"
"${train[@]}" "$out/pairs.jsonl" --stage dpo --model "$out/sft/model" --out "$out/dpo" \
    --valid "$data/valid-sft.jsonl" --minutes "${DPO_MINUTES:-5}" --lr 2e-5 --warmup 20 \
    --batch-tokens 3600 --beta 0.1 --dpo-sft 0.2

for stage in pretrain sft dpo; do
    say "what $stage has achieved"
    "$python" "$root/scripts/evaluate_tiny.py" --model "$out/$stage/model" --data "$data" \
        --json "$out/$stage.json"
done
