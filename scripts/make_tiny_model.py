"""Write the untrained small model: its shape, its tokenizer, and weights to begin with.

python scripts/make_tiny_model.py texts.txt OUT

texts.txt holds one text a line, in all the languages and forms that the model is to write.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from qwen2audio_core import chat, tiny
from qwen2audio_core.config import AudioConfig, Qwen2AudioConfig, TextConfig
from qwen2audio_core.errors import InputError
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.saving import save_model
from qwen2audio_core.tokenizer import SPLIT_PATTERN, Tokenizer
from qwen2audio_core.weights import preprocessor_config

# Of the published added tokens, in their order, all but timestamps, entities and music notes.
SPECIAL_TOKENS = [
    *tiny.SPECIAL_TOKENS[: tiny.SPECIAL_TOKENS.index("<|sil|>")],
    *tiny.SPECIAL_TOKENS[tiny.SPECIAL_TOKENS.index("<|unknown|>") :],
]
TEMPLATE = f"system\n{chat.DEFAULT_SYSTEM}\nuser\nassistant\nAudio 1: \n"


def train_tokenizer(lines: list[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens, cut as the published one is, and the special tokens."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Shell

    shell = Shell(models.BPE())
    shell.normalizer = normalizers.NFC()
    shell.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    shell.train_from_iterator([*lines, *[TEMPLATE] * 100], trainer)
    model = json.loads(shell.to_str())["model"]
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        len(model["vocab"]) + i: {"content": token, **flags, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    return Tokenizer(model["vocab"], merges, added)


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Whisper's table (positions, width): sin and cos of position / 10000^(i / (width / 2 - 1))."""
    half = width // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(positions)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def initialise(model: Qwen2Audio, seed: int) -> None:
    """Normal weights of spread 0.02, less where a layer adds to the stream; biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        "audio_tower": model.config.audio.encoder_layers,
        "language_model": model.config.text.num_hidden_layers,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tower = name.split(".")[0]
            if name.endswith("embed_positions.weight"):
                parameter.copy_(sinusoids(*parameter.shape))
            elif parameter.ndim == 1:
                parameter.fill_(float(name.endswith("norm.weight")))
            else:
                inputs = parameter[0].numel()
                std = 0.02 if "embed" in name else inputs**-0.5
                if name.endswith(
                    ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")
                ):
                    std /= math.sqrt(2 * layers[tower])
                parameter.normal_(0.0, std, generator=generator)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", metavar="TEXTS", help="a text a line")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--tokens", type=int, default=1500, help="of text, default 1500")
    parser.add_argument("--width", type=int, default=256, help="of both towers, default 256")
    parser.add_argument("--encoder-layers", type=int, default=5, help="default 5")
    parser.add_argument("--decoder-layers", type=int, default=5, help="default 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    try:
        lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
        tokenizer = train_tokenizer(lines, args.tokens)
        width = args.width
        config = Qwen2AudioConfig(
            AudioConfig(width, args.encoder_layers, width // 64, 4 * width),
            TextConfig(
                hidden_size=width,
                intermediate_size=width * 11 // 4,
                num_hidden_layers=args.decoder_layers,
                num_attention_heads=width // 64,
                num_key_value_heads=width // 64,
                vocab_size=-(-len(tokenizer) // 64) * 64,
                max_position_embeddings=4096,
            ),
            audio_token_id=tokenizer.id_of("<|AUDIO|>"),
        )
        end, turn_end = tokenizer.id_of("<|endoftext|>"), tokenizer.id_of("<|im_end|>")
        generation = {
            "do_sample": False,
            "repetition_penalty": 1.0,
            "eos_token_id": [end, turn_end],
            "pad_token_id": end,
        }
        model = Qwen2Audio(config)
        initialise(model, args.seed)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            for name, content in (
                ("generation_config.json", generation),
                ("preprocessor_config.json", preprocessor_config(config)),
            ):
                (Path(folder) / name).write_text(json.dumps(content, indent=1) + "\n")
            save_model(
                model,
                args.out,
                dtype=torch.bfloat16,
                companions=folder,
                overwrite=args.overwrite,
            )
    except (InputError, OSError) as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 2
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {count / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
