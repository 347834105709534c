"""A training step beside a plain one of the reference library, on the same rows.

python scripts/bench_train.py [--model FOLDER] [--rows 16] [--seconds 2] [--steps 5]

The plain step is what a person writes first: the library's processor pads every clip to 30 s, its
model computes logits at every position, AdamW steps. Both sides compute in the same dtype, on the
same rows, and their losses are compared before their times are.
"""

import argparse
import json
import sys
import tempfile
import time
import wave
from pathlib import Path

import torch

from qwen2audio_core import tiny
from qwen2audio_core.errors import InputError
from qwen2audio_core.training import loop, parallel


def write_rows(folder: Path, rows: int, seconds: float) -> Path:
    """Clips of noise and rows about them."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(rows):
        count = round(16_000 * seconds * (1 - 0.3 * i / rows))
        samples = (3000 * torch.randn(count, generator=generator)).clamp(-32768, 32767)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(samples.to(torch.int16).numpy().tobytes())
        prompt = "Detect the language and recognize the speech: <|en|>"
        lines.append({"audio": f"{i}.wav", "prompt": prompt, "gt": "one two three four five six"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ours(folder: str, data: Path, out: Path, bf16: bool, steps: int) -> tuple[float, list[float]]:
    """Loss of the first step, and seconds of each of the others; reading the rows is part of it."""
    settings = loop.Settings(
        folder, [str(data)], str(out), stage="pretrain", steps=steps + 2, warmup=0, lr=1e-5,
        batch_seconds=1e9, batch_tokens=1e9, bf16=bf16, clip=1.0,
    )  # fmt: skip
    run = loop.Run(settings, parallel.start(None), loop.read_rows(settings))
    batches = run._batches()
    times, first = [], 0.0
    for _ in range(steps + 1):
        began = time.perf_counter()
        figures = run.step([next(batches)], 0.0)
        if run.group.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        first = first or figures["loss"]
    return first, times[1:]


def plain(folder: str, data: Path, bf16: bool, steps: int) -> tuple[float, list[float]]:
    import soundfile
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).to(device)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01)
    features = transformers.WhisperFeatureExtractor(
        feature_size=model.config.audio_config.num_mel_bins
    )
    from qwen2audio_core.tokenizer import Tokenizer
    from qwen2audio_core.training.data import Rows, encode

    tokenizer = Tokenizer.from_folder(folder)
    rows = Rows([str(data)])
    # Tokenised by our reader, so that both sides learn the same ids; not part of the time.
    examples = [encode(rows[i], tokenizer) for i in range(len(rows))]
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), tokenizer.id_of("<|endoftext|>"))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = torch.tensor(example.ids)
        mask[i, : len(example.ids)] = 1
        ((begin, end),) = example.answers
        labels[i, begin:end] = ids[i, begin:end]
    times, first = [], 0.0
    for _ in range(steps + 1):
        began = time.perf_counter()
        clips = [soundfile.read(row.clips[0])[0] for row in (rows[i] for i in range(len(rows)))]
        heard = features(
            clips, sampling_rate=16_000, return_tensors="pt", padding="max_length",
            return_attention_mask=True,
        )  # fmt: skip
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                input_features=heard["input_features"].to(device),
                feature_attention_mask=heard["attention_mask"].to(device),
            )
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        first = first or float(found.loss.detach())
    return first, times[1:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="checkpoint folder; default: a random one of the tiny shape"
    )
    parser.add_argument("--rows", type=int, default=16, help="in a batch, default 16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the longest clip, default 2")
    parser.add_argument("--steps", type=int, default=5, help="timed, behind one to warm up")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 arithmetic")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    args = parser.parse_args(argv)
    bf16 = not args.float32
    try:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            folder = args.model
            if folder is None:
                folder = str(work / "model")
                tiny.write_random(folder, dtype=torch.float32)
            data = write_rows(work, args.rows, args.seconds)
            reference_loss, reference = plain(folder, data, bf16, args.steps)
            loss, times = ours(folder, data, work / "run", bf16, args.steps)
    except InputError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 2
    median, reference_median = (
        sorted(times)[len(times) // 2],
        sorted(reference)[len(reference) // 2],
    )
    figures = {
        "rows": args.rows,
        "seconds": args.seconds,
        "dtype": "bfloat16" if bf16 else "float32",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "loss": loss,
        "reference_loss": reference_loss,
        "step_seconds": median,
        "reference_step_seconds": reference_median,
        "speedup": reference_median / median,
    }
    if abs(loss - reference_loss) > 0.02 * reference_loss:
        print(f"bench_train: the losses differ, {loss} and {reference_loss}", file=sys.stderr)
        return 1
    for key, value in figures.items():
        print(f"{key:<24} {value:.4g}" if isinstance(value, float) else f"{key:<24} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
