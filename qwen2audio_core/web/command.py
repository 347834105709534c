"""`qwen2audio demo`: the page to talk to the model in a browser."""

import signal
import threading
from importlib.util import find_spec
from typing import Annotated, Literal

import typer

from qwen2audio_core import install
from qwen2audio_core.errors import InputError
from qwen2audio_core.options import Device, Dtype, Model, NoPack, Quantize
from qwen2audio_core.terminal import load, note


def demo(
    model: Model = "tiny",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free from 7860.")
    ] = None,
    share: Annotated[
        Literal["on", "off"],
        typer.Option(help="on: a public address too, through Gradio's servers."),
    ] = "off",
    password: Annotated[
        str | None,
        typer.Option(
            envvar="QWEN2AUDIO_PASSWORD",
            show_envvar=True,
            help="Ask for it first. On the command line others of this machine can read it.",
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page here.")] = False,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Of one upload.")] = 50,
    max_seconds: Annotated[float, typer.Option(min=1, help="Of the clips of one turn.")] = 300.0,
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
    quantize: Quantize = None,
) -> None:
    """Talk to the model in a browser: microphone, uploads, and a look inside its answers.

    Nothing leaves this machine, and no other one can connect, unless --host or --share says so.

    Example:

        qwen2audio demo --model Qwen/Qwen2-Audio-7B-Instruct --open
    """
    if find_spec("gradio") is None:
        raise InputError(f"the page needs Gradio: {install.extra('web')}")
    if password == "":
        raise InputError("the password is empty: give one, or leave it out")
    from qwen2audio_core.web import server
    from qwen2audio_core.web.sessions import Limits

    server.free_port(host, port)  # before the model is loaded
    for warning in server.warnings(host, share == "on", password):
        note(f"warning: {warning}")
    assistant = load(model, device, dtype, no_pack, quantize)
    limits = Limits(upload_bytes=max_megabytes * 2**20, seconds=max_seconds)
    over = threading.Event()
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, lambda *_: over.set())
    with server.serving(
        assistant, limits=limits, host=host, port=port, password=password, share=share == "on"
    ) as addresses:
        if share == "on" and len(addresses) == 1:
            note("warning: Gradio's servers gave no public address, only this machine can connect")
        note(f"{' and '.join(addresses)} (Ctrl-C ends it)")
        if open_browser:
            import webbrowser

            webbrowser.open(addresses[0])
        over.wait()
    note("closed")
