"""Options that several commands share: each declared once, with its help text."""

from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Hub id (Qwen/Qwen2-Audio-7B-Instruct), folder, tiny or random.",
    ),
]
Audio = Annotated[
    list[str] | None,
    typer.Option("--audio", "-a", metavar="FILE...", help="Clips, files or URLs, one or more."),
]
System = Annotated[str | None, typer.Option("--system", "-s", help="Another system prompt.")]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="No sampling. Keeps the checkpoint's repetition penalty.")
]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature.")]
TopK = Annotated[int | None, typer.Option(help="Sample among so many tokens, 0 for all.")]
TopP = Annotated[float | None, typer.Option(help="Sample among tokens of this probability mass.")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="1 for none.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
NewTokens = Annotated[
    int | None, typer.Option(help="Longest answer in tokens; the prompt does not count.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text.")]
Long = Annotated[
    Literal["split", "cut", "error"], typer.Option(help="What to do with a clip over 30 s.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best here.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option(help="Default: the checkpoint's own."),
]
NoPack = Annotated[
    bool, typer.Option("--no-pack", help="Less memory on a CPU, slower: no packed weights.")
]
Quantize = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(help="Language model in 8 or 4 bits a weight: less memory, faster, less exact."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")]
