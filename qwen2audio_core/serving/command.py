"""The command `qwen2audio serve`."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from qwen2audio_core.options import Device, Dtype, Model, NoPack, Quantize


def serve(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for everybody.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QWEN2AUDIO_API_KEY",
            show_envvar=False,
            help="Ask for this key. Rather set QWEN2AUDIO_API_KEY: others see a command line.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of https://this.example call it; again for more, * for any.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: as --model.")
    ] = None,
    allow_files: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let file:// URLs name files in this folder."),
    ] = None,
    allow_private_urls: Annotated[
        bool,
        typer.Option(
            "--allow-private-urls",
            help="Also download from addresses of this machine and its networks.",
        ),
    ] = False,
    slots: Annotated[int, typer.Option(help="Answers written at a time.")] = 8,
    context: Annotated[
        int, typer.Option(help="Tokens of a prompt and its answer; memory is slots x this.")
    ] = 2048,
    prefix_mb: Annotated[
        int, typer.Option(help="MiB for what was read before; 0 for nothing.")
    ] = 1024,
    int8_cache: Annotated[
        bool, typer.Option("--int8-cache", help="Half the memory for slots, a little error.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="The same bits alone and in any company. Slower on a CPU."
        ),
    ] = False,
    max_answer_tokens: Annotated[int, typer.Option(help="Of one answer.")] = 1024,
    max_answers: Annotated[int, typer.Option(help="To one request (n).")] = 8,
    max_clips: Annotated[int, typer.Option(help="In one request.")] = 16,
    max_audio_seconds: Annotated[float, typer.Option(help="Of all clips of a request.")] = 1800,
    max_body_mb: Annotated[int, typer.Option(help="MiB of one request.")] = 64,
    max_held_mb: Annotated[
        int, typer.Option(help="MiB of bodies and waveforms of all open requests.")
    ] = 2048,
    max_open: Annotated[
        int, typer.Option(help="Requests open at a time; more are told to come back.")
    ] = 128,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = 600,
    body_timeout: Annotated[float, typer.Option(help="Seconds for sending a body.")] = 60,
    fetch_timeout: Annotated[float, typer.Option(help="Seconds for a download.")] = 30,
    grace: Annotated[
        float, typer.Option(help="Seconds at the end for what is being answered.")
    ] = 60,
    workers: Annotated[int, typer.Option(help="Threads that decode audio.")] = 4,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line on stderr for each request.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
    quantize: Quantize = None,
) -> None:
    """Answer over HTTP as OpenAI does: chat with audio, transcriptions, translations.

    docs/server.md shows requests, limits and what differs from OpenAI.

    Examples:

        qwen2audio serve --model Qwen/Qwen2-Audio-7B-Instruct

        qwen2audio serve    (the small model, called tiny)

        curl http://127.0.0.1:8000/v1/audio/transcriptions -F model=tiny -F file=@talk.mp3
    """
    from qwen2audio_core.errors import InputError
    from qwen2audio_core.hosts import is_loopback, own_names
    from qwen2audio_core.serving.policy import Policy
    from qwen2audio_core.serving.run import bind, check_installed, terminable
    from qwen2audio_core.serving.run import serve as run
    from qwen2audio_core.terminal import load, note, quiet_libraries

    check_installed()
    if api_key is None and "QWEN2AUDIO_API_KEY" in os.environ:  # a secret that was not filled in
        raise InputError("QWEN2AUDIO_API_KEY is empty: unset it for a server without a key")
    alone = is_loopback(host)
    folder = Path(model).expanduser()
    policy = Policy(
        name=name or (folder.resolve().name if folder.is_dir() else model),
        api_key=None if api_key is None else api_key.strip(),  # secrets' files end in a new line
        origins=frozenset(origin.lower().rstrip("/") for origin in allow_origin or ()),
        hosts=own_names(host) if alone and api_key is None else None,
        allow_files=allow_files,
        allow_private_urls=allow_private_urls,
        body_bytes=max_body_mb * 2**20,
        held_bytes=max_held_mb * 2**20,
        audio_seconds=max_audio_seconds,
        clips=max_clips,
        answer_tokens=max_answer_tokens,
        answers=max_answers,
        open_requests=max_open,
        request_seconds=timeout,
        body_seconds=body_timeout,
        fetch_seconds=fetch_timeout,
        workers=workers,
    )
    for option, value, least in (
        ("--slots", slots, 1),
        ("--context", context, 64),  # a word in the published template takes 20 to 33
        ("--grace", grace, 0),
        ("--prefix-mb", prefix_mb, 0),
    ):
        if not least <= value < math.inf:
            raise InputError(f"{option} is {value:g}, it must be a number of at least {least}")
    sock = bind(host, port)
    if not alone and api_key is None:
        note(f"warning: everybody who reaches {host} can use this server: set QWEN2AUDIO_API_KEY")
    with terminable():
        assistant = load(model, device, dtype, no_pack, quantize)
        with quiet_libraries():
            run(
                sock,
                assistant,
                policy,
                {
                    "max_batch": slots,
                    "max_tokens": context,
                    "prefix_bytes": prefix_mb * 2**20,
                    "int8_cache": int8_cache,
                    "deterministic": deterministic,
                },
                access_log=access_log,
                grace=grace,
            )
