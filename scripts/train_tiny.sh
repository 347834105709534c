#!/usr/bin/env bash
# Makes the small model from nothing: data, three stages of training, the second in two parts, and
# what each has achieved.
#
#     bash scripts/train_tiny.sh [DIR]                  default: tiny-run
#     TINY_PART=0.01 bash scripts/train_tiny.sh trial   all of it in little, to see that it runs
#
# Every part goes on where it was broken off: give the same command again. Needs espeak-ng, flite and
# festival with its voice festvox-us-slt-hts; RHVoice and SVOX Pico (Debian's rhvoice, rhvoice-english
# and libttspico-utils, non-free) are used where they are installed.
#
# PRETRAIN_MINUTES (105), SFT_MINUTES (45), SHORT_MINUTES (30) and DPO_MINUTES (4) say how long the
# stages may take: the learning rate falls to zero by then, so more minutes or a faster machine make a
# better model. The data comes before that. TINY_PART (1) makes so much of the data and, where the
# minutes are not given, trains for so much of them, half a minute a stage at least: it learns nothing
# in that time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

part="${TINY_PART:-1}"

# times NUMBER LEAST: NUMBER * part, and no less than LEAST
times() { awk -v n="$1" -v least="$2" -v part="$part" 'BEGIN { n *= part; print (n < least ? least : n) }'; }

[[ "$part" =~ ^(1|1\.0*|0?\.[0-9]*[1-9][0-9]*)$ ]] ||
    fail "TINY_PART is $part: above 0 and at most 1"
prepare_environment test
out="${1:-tiny-run}"
data="$out/data"
python="$environment/bin/python"
mkdir -p "$out"
made_with="$(cat "$out/part" 2>/dev/null || printf '%s' "$part")"
[ "$made_with" = "$part" ] || fail "$out was begun with TINY_PART=$made_with: take another folder"
printf '%s' "$part" >"$out/part"

train=("$environment/bin/qwen2audio" train --batch-seconds 48 --weight-decay 0.05
    --save-every "$(times 200 5 | cut -d. -f1)" --eval-every 400 --eval-rows 96)

# evaluate STAGE: unless it has been measured since it was trained
evaluate() {
    [ "$out/$1.json" -nt "$out/$1/model/model.safetensors" ] && return
    say "what $1 has achieved"
    "$python" "$root/scripts/evaluate_tiny.py" --model "$out/$1/model" --data "$data" \
        --json "$out/$1.json"
}

say "data: $data"
"$python" "$root/scripts/make_tiny_data.py" --out "$data" --part "$part"
[ -d "$out/begin" ] || "$python" "$root/scripts/make_tiny_model.py" "$data/texts.txt" "$out/begin"

# An encoder that hears nothing yet gives the decoder nothing to learn from: it is first told which
# sound of speech is in each frame, alone, then beside the texts; and half of the heads of the upper
# decoder layers where in the clip the next token of a transcript is said.
# --voice moves what is heard as other throats and microphones would: voices never heard gain by it.
engines=() some_engines=()
if [ -f "$data/engines.jsonl" ]; then
    engines=("$data/engines.jsonl") some_engines=("$data/engines.jsonl@0.5")
fi
say "pretraining"
"${train[@]}" "$data/pretrain.jsonl" "$data/words.jsonl" ${engines[@]+"${engines[@]}"} --stage pretrain \
    --model "$out/begin" --out "$out/pretrain" --valid "$data/valid-pretrain.jsonl" \
    --minutes "${PRETRAIN_MINUTES:-$(times 105 0.5)}" --lr 1e-3 --batch-tokens 3000 \
    --sounds "$data/phones.jsonl" --listen-steps "$(times 250 5 | cut -d. -f1)" \
    --ctc-weight 0.3 --attend-weight 0.5 --auxiliary-until 0.95 --voice 0.08

say "fine-tuning"
"${train[@]}" "$data/sft.jsonl" "$data/pretrain.jsonl@0.3" "$data/words.jsonl@0.4" \
    ${some_engines[@]+"${some_engines[@]}"} --stage sft \
    --model "$out/pretrain/model" --out "$out/sft" --valid "$data/valid-sft.jsonl" \
    --minutes "${SFT_MINUTES:-$(times 45 0.5)}" --lr 8e-4 --warmup 50 --batch-tokens 3600 \
    --sounds "$data/phones.jsonl" --sounds-weight 0.4 --attend-weight 0.3 --auxiliary-until 0.95 \
    --voice 0.08

# Answers of one word that hang on the whole clip (a man or a woman, which is louder) are lost among
# those of whole sentences, whose tokens are many more: after hours they are still guessed. With
# --mean-over rows an answer weighs the same whatever its length. Half of the rows are those of the
# pretraining: with a third of them the model came to hear worse.
say "short answers"
"${train[@]}" "$data/drills.jsonl" "$data/sft.jsonl@0.3" "$data/pretrain.jsonl@0.5" \
    "$data/words.jsonl@0.3" ${some_engines[@]+"${some_engines[@]}"} --stage sft \
    --model "$out/sft/model" --out "$out/short" --valid "$data/valid-sft.jsonl" \
    --minutes "${SHORT_MINUTES:-$(times 30 0.5)}" --lr 6e-4 --warmup 30 --batch-tokens 3600 \
    --mean-over rows --voice 0.08

say "preference"
[ -f "$out/pairs.jsonl" ] || "$python" "$root/scripts/make_tiny_pairs.py" \
    --model "$out/short/model" --data "$data" --rows "$(times 2000 64 | cut -d. -f1)" \
    --out "$out/pairs.jsonl"
"${train[@]}" "$out/pairs.jsonl" --stage dpo --model "$out/short/model" --out "$out/dpo" \
    --valid "$data/valid-sft.jsonl" --minutes "${DPO_MINUTES:-$(times 4 0.5)}" --lr 5e-5 \
    --warmup 20 --batch-tokens 3600 --beta 0.1 --dpo-sft 0.5

for stage in pretrain sft short dpo; do
    evaluate "$stage"
done
