"""Write a checkpoint of random weights in the published layout.

python scripts/make_checkpoint.py --shapes tiny --seed 0 OUT
python scripts/make_checkpoint.py --shapes official --tokenizer DIR OUT        (16.8 GB)
python scripts/make_checkpoint.py --config config.json --tokenizer DIR OUT     (any other shape)
"""

import argparse
import sys

import torch

from qwen2audio_core import tiny
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError

SHAPES = {"official": Qwen2AudioConfig(), "tiny": tiny.TINY}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument(
        "--shapes", choices=SHAPES, help="the published shapes, or those of the tiny model"
    )
    shape.add_argument("--config", metavar="JSON", help="a config.json with other shapes")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="copy the tokenizer from here; without it a byte-level one is made",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16"
    )
    parser.add_argument(
        "--std", type=float, default=0.02, help="spread of the weights, default 0.02"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is there"
    )
    args = parser.parse_args(argv)
    try:
        config = SHAPES[args.shapes] if args.shapes else Qwen2AudioConfig.from_json(args.config)
        tiny.write_random(
            args.out,
            config,
            seed=args.seed,
            dtype=getattr(torch, args.dtype),
            std=args.std,
            tokenizer=args.tokenizer,
            overwrite=args.overwrite,
        )
    except CheckpointError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
