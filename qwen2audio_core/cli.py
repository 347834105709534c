"""The command `qwen2audio`.

Errors a person can cause are one line on stderr and exit code 2. Answers go to stdout, everything
else to stderr.
"""

if __name__ == "__main__":  # python -m qwen2audio_core.cli is python -m qwen2audio_core
    from runpy import run_module

    run_module("qwen2audio_core", run_name="__main__")  # ends the process

import io
import json
import os
import shlex
import sys
import time
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from qwen2audio_core import __version__
from qwen2audio_core.errors import InputError
from qwen2audio_core.evaluation.command import evaluate
from qwen2audio_core.inspection.command import inspect
from qwen2audio_core.options import (
    Audio,
    Device,
    Dtype,
    Greedy,
    Long,
    Model,
    NewTokens,
    NoPack,
    Penalty,
    Quantize,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
)
from qwen2audio_core.quantize_command import quantize as quantize_checkpoint
from qwen2audio_core.serving.command import serve
from qwen2audio_core.terminal import (
    URLS,
    load,
    memory_line,
    note,
    printable,
    quiet_libraries,
    write,
)
from qwen2audio_core.training.command import merge, rows, train
from qwen2audio_core.web.command import demo

app = typer.Typer(
    help="Qwen2-Audio in plain PyTorch: ask about speech, sound and music, and get text.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qwen2audio {__version__}")
        raise typer.Exit()


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and end.")
    ] = False,
) -> None:
    pass


@app.command()
def ask(
    text: Annotated[str | None, typer.Argument(help="The question. None: the clip asks.")] = None,
    audio: Audio = None,
    model: Model = "tiny",
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="TEXT is the whole prompt, as for the base model.")
    ] = False,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_new_tokens: NewTokens = None,
    stop: Stop = None,
    long: Long = "split",
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
    quantize: Quantize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask about clips, or let a clip ask.

    Examples:

        qwen2audio ask "What is that sound?" --audio glass.mp3

        qwen2audio ask --audio question.wav

        qwen2audio ask "Which is louder?" --audio a.wav b.wav --greedy

        qwen2audio ask --raw --model Qwen/Qwen2-Audio-7B --audio clip.wav \\
            "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
    """
    from qwen2audio_core.assistant import user_turn
    from qwen2audio_core.audio_files import check_local

    message = user_turn(text, audio)  # before the model is loaded, as all that could be a slip
    if text and _named_as_clip(text):
        if os.path.isfile(text) or text.startswith(URLS):
            raise InputError(f"{text} is a clip, not a question: give it as --audio {text}")
        if not any(map(str.isspace, text)):
            raise InputError(f"{text}: no such file; clips go behind --audio")
    if raw and (text is None or system is not None):
        raise InputError("--raw takes TEXT as the whole prompt, and no --system")
    for clip in audio or ():
        check_local(clip)
    drawing = _drawing(greedy, temperature, repetition_penalty, max_new_tokens, top_k, top_p)
    began = time.perf_counter()
    assistant = load(model, device, dtype, no_pack, quantize)
    loaded = time.perf_counter()
    with quiet_libraries():
        prompt = (
            assistant.encode_raw(text or "", audio, "cut" if long == "cut" else "error", note)
            if raw  # one placeholder holds one clip, so a raw prompt cannot be split
            else assistant.encode([message], system, long, note)
        )
    stream = assistant.stream_prompts([prompt], seed=seed, stop=stop or (), **drawing)
    ready = time.perf_counter()
    for piece in stream:
        if not as_json:
            write(printable(piece))
    reply = stream.reply
    if not as_json:
        write("\n")
        if reply.finish_reason == "length":
            limit = max_new_tokens or assistant.settings.max_new_tokens
            advice = "--max-new-tokens" if len(reply.ids) >= limit else "the model's context"
            note(f"the answer was cut after {len(reply.ids)} tokens by {advice}")
        return
    seconds = {"load": loaded - began, "audio": 0.0, **reply.seconds}
    seconds["audio"] = ready - loaded - seconds["encode"] - seconds["prefill"]  # to log-mels
    result = {
        "text": reply.text,
        "ids": reply.ids,
        "prompt_ids": prompt.ids,
        "prompt_tokens": len(prompt.ids),
        "audio_tokens": prompt.audio_tokens,
        "finish_reason": reply.finish_reason,
        "model": model,
        "device": str(assistant.device),
        "dtype": str(assistant.dtype).removeprefix("torch."),
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
    }
    write(json.dumps(result, ensure_ascii=False) + "\n")


@app.command()
def chat(
    model: Model = "tiny",
    system: System = None,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_new_tokens: NewTokens = None,
    long: Long = "split",
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
    quantize: Quantize = None,
) -> None:
    """Talk in the terminal: /audio FILE, /drop, /record, /system, /clear, /retry, /save, /exit.

    This one is interactive: it reads a line at a time and goes on after an error, which is one
    line on stderr; the dialogue is on stdout. Its exit code says nothing about single turns.

    Example:

        qwen2audio chat --model Qwen/Qwen2-Audio-7B-Instruct
    """
    from qwen2audio_core.talk import Talk

    if sys.stdin is None:
        raise InputError("stdin is closed: chat reads its lines there")
    options = {
        **_drawing(greedy, temperature, repetition_penalty, max_new_tokens, top_k, top_p),
        "seed": seed,
        "long": long,
        "notice": note,
    }
    if sys.stdin.isatty():
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  (gives input() editing and history)
    talk = Talk(load(model, device, dtype, no_pack, quantize), options, system)
    with quiet_libraries():
        talk.run()


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Recordings or URLs.")],
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format", "-f", help="txt (default), srt, vtt, tsv, json or all; may be repeated."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write here; default: print."),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(help="Its tag (en, zh, yue, fr, ...); default: the model names it."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Instead of the published recognition prompt.")
    ] = None,
    model: Model = "tiny",
    translate: Annotated[
        bool, typer.Option("--translate", help="Into English, with the published prompt for that.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows of up to 30 s, of all files, answered at once.")
    ] = 8,
    word_timestamps: Annotated[
        bool, typer.Option("--word-timestamps", help="When each word was said; in json.")
    ] = False,
    greedy: Greedy = False,
    temperature: Temperature = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_new_tokens: NewTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
    quantize: Quantize = None,
) -> None:
    """Write down what is said, with the published recognition prompts; of any length.

    Printed are one recording in one format, or several as txt, each file's name on stderr, or as
    json, a line for each with its "file". Everything else goes into a folder, a file for each:
    -o DIR.

    Examples:

        qwen2audio transcribe talk.mp3 --language en

        qwen2audio transcribe *.flac -f srt -f json -o subtitles --model Qwen/Qwen2-Audio-7B
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen2audio_core import transcribe as transcripts
    from qwen2audio_core.audio_files import check_local, source_name
    from qwen2audio_core.errors import AudioError

    formats = transcripts.kinds_of(format or ["txt"])  # slips are told of before the model is read
    several = len(files) > 1
    if output is None and (len(formats) > 1 or (several and formats[0] not in ("txt", "json"))):
        what = f"{len(formats)} formats" if len(formats) > 1 else f"{formats[0]} of several files"
        raise InputError(f"{what} would run into one another: give a folder for them, -o DIR")
    if output is not None and not os.path.isdir(output):
        ending = os.path.splitext(output)[1][1:].lower()
        if ending in transcripts.FORMATS:
            raise InputError(f"-o is a folder; for the file: -f {ending} > {shlex.quote(output)}")
    if word_timestamps and "json" not in formats:
        note("word times are written in json alone: add -f json")
    there = []
    for file in files:
        try:
            check_local(file)
            there.append(file)
        except AudioError as error:
            note(f"error: {error}")
    failed = len(there) < len(files)
    if not there:
        raise typer.Exit(2)
    drawing = _drawing(greedy, temperature, repetition_penalty, max_new_tokens)
    assistant = load(model, device, dtype, no_pack, quantize)
    with (
        quiet_libraries(),
        Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=not sys.stderr.isatty()),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # to stderr: transcripts stay where they are sent
        ) as progress,
    ):
        task = progress.add_task("", total=1)

        def show(file: str, done: float, whole: float) -> None:
            name = printable(os.path.basename(file))
            progress.update(task, description=name, completed=done, total=whole)

        for outcome in transcripts.run(
            assistant,
            there,
            output,
            formats,
            on_progress=show,
            language=language,
            prompt=prompt,
            translate=translate,
            logprobs=0 if "json" in formats else None,
            batch_size=batch_size,
            words=word_timestamps,
            notice=note,
            seed=seed,
            **drawing,
        ):
            if outcome.transcript is None:
                failed = True
                note(f"error: {outcome.error}")
            elif output is None:
                if several and formats == ["json"]:
                    write(transcripts.json_line(outcome.source, outcome.transcript))
                    continue
                if several:
                    note(f"{source_name(outcome.source)}:")
                written = transcripts.FORMATS[formats[0]](outcome.transcript)
                write(written if formats == ["json"] else printable(written))
            for path in outcome.files:
                note(f"wrote {path if str(path).isprintable() else repr(str(path))}")
    if failed:
        raise typer.Exit(2)


@app.command()
def compare(
    text: Annotated[str | None, typer.Argument(help="The question.")] = None,
    audio: Audio = None,
    model: Model = "tiny",
    max_new_tokens: Annotated[int, typer.Option(help="Length of both answers.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps, for both.")] = "cpu",
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run transformers and this program side by side, on the CPU, and show where they part.

    Exit code 0: everything agrees. 1: the first module that differs is named.

    Example:

        qwen2audio compare "What is that sound?" --audio glass.mp3 --model CHECKPOINT_FOLDER
    """
    from qwen2audio_core import compare as comparison
    from qwen2audio_core.assistant import pick_device
    from qwen2audio_core.audio_files import check_local

    for clip in audio or ():
        check_local(clip)
    code = comparison.run(
        model,
        audio or (),
        text,
        device=str(pick_device(device)),
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        as_json=as_json,
    )
    raise typer.Exit(code)


@app.command()
def info(
    model: Model = "tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a checkpoint's sizes, dtypes and memory needs, without reading its weights.

    Example:

        qwen2audio info --model Qwen/Qwen2-Audio-7B-Instruct
    """
    from qwen2audio_core.info import describe

    found = describe(model)
    if as_json:
        write(json.dumps(found.to_json(), ensure_ascii=False) + "\n")
    else:
        import rich

        rich.print(found)


app.command()(serve)
app.command("quantize")(quantize_checkpoint)
app.command()(demo)
app.command()(inspect)


def _drawing(
    greedy: bool,
    temperature: float | None,
    repetition_penalty: float | None,
    max_new_tokens: int | None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> dict[str, Any]:
    """Options of how an answer is drawn, looked at before a model is loaded for them."""
    from qwen2audio_core.assistant import change
    from qwen2audio_core.sampling import Settings

    changes: dict[str, Any] = {
        "greedy": greedy or None,
        "temperature": temperature,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "top_k": top_k,
        "top_p": top_p,
    }
    change(Settings(), **changes)
    return changes


def _named_as_clip(word: str) -> bool:
    from qwen2audio_core.audio_files import SUFFIXES

    return os.path.splitext(word.lower())[1] in SUFFIXES


def expand_clips(words: list[str]) -> list[str]:
    """Let one --audio take several files: `--audio a.wav b.wav` -> `--audio a.wav --audio b.wav`.

    Words behind a clip are clips as long as they name files or are URLs; the first other one is
    the question. InputError if that one looks like a file: it was meant to be heard.
    """
    result: list[str] = []
    taking = False
    for i, word in enumerate(words):
        if word == "--":
            return result + words[i:]
        if word.startswith("-"):
            taking = word == "--audio" or word.startswith(("--audio=", "-a"))
        elif taking and result[-1] not in ("--audio", "-a"):
            bare = not any(map(str.isspace, word))
            taking = os.path.isfile(word) or (bare and word.startswith(URLS))
            if taking:
                result.append("--audio")
            elif os.path.isdir(word):
                raise InputError(
                    f"{word}: is a folder; name its files, or if it is the question, put it first"
                )
            elif _named_as_clip(word) or (bare and ("/" in word or os.sep in word)):
                raise InputError(f"{word}: no such file; if it is the question, put it first")
        result.append(word)
    return result


app.command()(evaluate)
app.command()(train)
app.command()(rows)
app.command()(merge)


def main() -> NoReturn:
    """Entry point of the console command."""
    usage_error: Any = typer.BadParameter.__base__
    _mend_streams()
    try:
        words = expand_clips(sys.argv[1:]) or ["--help"]
        code = app(words, prog_name="qwen2audio", standalone_mode=False)
    except InputError as error:
        code = _fail(str(error))
    except usage_error as error:
        told = error.format_message()
        extra = told.partition("Got unexpected extra argument")[2].rstrip(")").lower().split()
        if any(map(_named_as_clip, extra)):
            told += "; clips go behind --audio"
        where = error.ctx.command_path if error.ctx else "qwen2audio"
        if not error.ctx and not words[0].startswith("-"):
            where += f" {words[0]}"
        code = _fail(f"{told} (see {where} --help)")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (BrokenPipeError, SystemExit):  # typer and rich make an exit of a reader that left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to flush
        code = 128 + 13  # as if ended by SIGPIPE
    except (MemoryError, RuntimeError) as error:
        line = memory_line(error)
        if line is None:
            raise
        code = _fail(line)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        code = _fail(what + (error.strerror or str(error) or type(error).__name__))
    if code == 130:  # Ctrl-C, which typer may have caught itself
        note("\ninterrupted")
    sys.exit(code or 0)


def _mend_streams() -> None:
    """Let there be streams to write to, that take every character."""
    if sys.stderr is None:  # closed by whoever runs us; print() would turn to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        if sys.argv[1:2] and sys.argv[1] in ("ask", "chat", "transcribe", "compare", "info"):
            sys.exit(_fail("stdout is closed: there is nowhere to put the answer"))
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal has no letter for is escaped. A file or pipe has them all, whatever the
        # system's old code page is, unless somebody asks for another encoding.
        any_letter = not sys.stdout.isatty() and not os.environ.get("PYTHONIOENCODING")
        encoding = "utf-8" if any_letter else sys.stdout.encoding
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


def _fail(line: str) -> int:
    print("error: " + " ".join(line.split()), file=sys.stderr)
    return 2
