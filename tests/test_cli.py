"""The command line as a person meets it: what it prints where, and how it fails."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from qwen2audio_core import assistant, cli, compare, tiny
from qwen2audio_core.assistant import StopWriter
from qwen2audio_core.audio_files import check_local
from qwen2audio_core.compare import Report
from qwen2audio_core.errors import InputError
from qwen2audio_core.talk import Talk, file_name

CLIPS = Path(cli.__file__).parent / "assets" / "clips"


@pytest.fixture(autouse=True, scope="module")
def one_cache(tmp_path_factory):
    """The tiny checkpoint is made once, in a folder of these tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def with_model(words):
    """The words of a call; where they name no model, the random one, which never falls silent."""
    words = [str(word) for word in words]
    takes = words[:1] and words[0] in ("ask", "chat", "transcribe", "compare", "info")
    if takes and not {"--model", "-m", "--help"} & set(words):
        words[1:1] = ["--model", "random"]
    return words


@pytest.fixture
def run(monkeypatch, capsys):
    """run("ask", ...) -> (exit code, stdout, stderr), in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qwen2audio", *with_model(words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def failure(result):
    """The one line of a failed call, which wrote nothing to stdout."""
    code, out, err = result
    lines = [line for line in err.splitlines() if "This is the small random model" not in line]
    assert (code, out) == (2, ""), err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.fixture(scope="module")
def question():
    return next(iter(sorted(CLIPS.glob("en*.flac"))))


def test_ask_streams_an_answer_and_says_that_tiny_means_nothing(run, question):
    code, out, err = run("ask", "What?", "--audio", question, "--greedy", "--max-new-tokens", 8)
    assert code == 0
    assert out.endswith("\n") and len(out) > 1
    assert "its words mean nothing" in err


def test_json_is_one_object_and_nothing_else(run, question):
    words = ("ask", "What?", "--audio", question, "--max-new-tokens", 8, "--greedy", "--json")
    code, out, _ = run(*words)
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert list(result) == [
        "text",
        "ids",
        "prompt_ids",
        "prompt_tokens",
        "audio_tokens",
        "finish_reason",
        "model",
        "device",
        "dtype",
        "seconds",
    ]
    assert len(result["ids"]) == 8 and result["finish_reason"] == "length"
    assert result["prompt_tokens"] == len(result["prompt_ids"])
    token = tiny.TINY.audio_token_id
    assert result["prompt_ids"].count(token) == sum(result["audio_tokens"]) > 0
    assert set(result["seconds"]) == {"load", "audio", "encode", "prefill", "decode"}
    assert all(value > 0 for value in result["seconds"].values())
    assert json.loads(run(*words)[1])["ids"] == result["ids"]


def test_the_answer_depends_on_the_clip(run, question):
    others = [clip for clip in sorted(CLIPS.glob("*.flac")) if clip != question][:2]
    ids = set()
    for clip in (question, *others):
        out = run("ask", "--audio", clip, "--greedy", "--max-new-tokens", 24, "--json")[1]
        ids.add(tuple(json.loads(out)["ids"]))
    assert len(ids) > 1


def test_several_clips_behind_one_option(run, question):
    code, out, _ = run(
        "ask", "--audio", question, question, "Same?", "--json", "--max-new-tokens", 1
    )
    assert code == 0
    tokens = json.loads(out)["audio_tokens"]
    assert len(tokens) == 2 and tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["ask", "-a", "A", "B", "why"], ["ask", "-a", "A", "--audio", "B", "why"]),
        (["ask", "why", "-a", "A", "-m", "B"], ["ask", "why", "-a", "A", "-m", "B"]),
        (["ask", "--audio", "A", "why", "B"], ["ask", "--audio", "A", "why", "B"]),
        (["ask", "--audio", "missing", "B"], ["ask", "--audio", "missing", "--audio", "B"]),
        (["ask", "-a", "A", "--", "B"], ["ask", "-a", "A", "--", "B"]),
        (["ask", "--audio=A", "B"], ["ask", "--audio=A", "--audio", "B"]),
        (["ask", "-aA", "B", "why"], ["ask", "-aA", "--audio", "B", "why"]),
        (
            ["ask", "-a", "http://x/1", "https://x/2"],
            ["ask", "-a", "http://x/1", "--audio", "https://x/2"],
        ),
        (
            ["ask", "-a", "A", "data:audio/wav;base64,AA"],
            ["ask", "-a", "A", "--audio", "data:audio/wav;base64,AA"],
        ),
        (["ask", "-a", "A", "and/or what?"], ["ask", "-a", "A", "and/or what?"]),
    ],
)
def test_which_words_are_clips(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    for name in "AB":
        (tmp_path / name).touch()
    assert cli.expand_clips(words) == expected


def test_sampling_is_repeatable_under_a_seed(run, question):
    def ids(*options):
        words = ("ask", "--audio", question, "--max-new-tokens", 24, "--json", *options)
        return json.loads(run(*words)[1])["ids"]

    assert ids("--temperature", 2, "--seed", 3) == ids("--temperature", 2, "--seed", 3)
    assert ids("--temperature", 2, "--seed", 3) != ids("--temperature", 2, "--seed", 4)


def test_greedy_keeps_the_checkpoints_penalty(run, question):
    def ids(*options):
        words = ("ask", "--audio", question, "--greedy", "--max-new-tokens", 24, "--json", *options)
        return json.loads(run(*words)[1])["ids"]

    assert ids() == ids("--repetition-penalty", 1.1)
    assert ids() != ids("--repetition-penalty", 1.9)


def test_raw_prompt(run, question):
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
    code, out, _ = run("ask", "--raw", prompt, "--audio", question, "--json", "--max-new-tokens", 2)
    assert code == 0
    result = json.loads(out)
    ids, token = result["prompt_ids"], tiny.TINY.audio_token_id
    assert ids[0] == token + 1 and ids[1] == token
    assert ids[result["audio_tokens"][0] + 1] == token + 2
    assert tiny.TINY.audio_token_id - 2 not in ids  # no <|im_start|>


def test_longer_than_30_s_is_split_with_a_notice(run, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "long.wav", torch.randn(16000 * 40).numpy() * 0.1, 16000)
    words = ("ask", "--audio", tmp_path / "long.wav", "--json", "--max-new-tokens", 1)
    code, out, err = run(*words)
    assert code == 0 and "40.0 s long: split into 2 pieces" in err
    assert len(json.loads(out)["audio_tokens"]) == 2
    assert "40.0 s long, the model hears 30 s at once" in failure(run(*words, "--long", "error"))
    code, out, err = run(*words, "--long", "cut")
    assert code == 0 and "long.wav" in err and json.loads(out)["audio_tokens"] == [750]


def test_dtype_and_device(run, question):
    out = run("ask", "--audio", question, "--dtype", "bfloat16", "--json", "--max-new-tokens", 1)[1]
    assert json.loads(out)["dtype"] == "bfloat16"
    assert "device 'nonsense' cannot be used" in failure(
        run("ask", "--audio", question, "--device", "nonsense")
    )
    if not torch.backends.mps.is_available():  # PyTorch says it in a kilobyte
        said = failure(run("ask", "--audio", question, "--device", "mps"))
        assert "device 'mps' cannot be used" in said and len(said) < 300


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "nothing was asked: give a text, a clip, or both"),
        (["x", "--temperature", "0"], "temperature is 0.0, it must be 0.0001 to 10,000"),
        (["x", "--greedy", "--temperature", "1"], "greedy decoding draws nothing"),
        (["x", "--top-p", "2"], "top_p is 2.0, it must be"),
        (
            ["x", "--max-new-tokens", "0"],
            "max_new_tokens is 0, it must be a whole number of at least 1",
        ),
        (["x", "--audio", "no-such.wav"], "no-such.wav"),
        (["--audio", "a", "no-such.wav"], "no-such.wav: no such file; if it is the question"),
        (["--audio=a", "clips/no-such"], "clips/no-such: no such file; if it is the question"),
        (["--audio", "a", "no-such.mov"], "no-such.mov: no such file; if it is the question"),
        (["--audio", "a", "folder"], "folder: is a folder; name its files, or if it"),
        (["https://x.org/a.mp3"], "https://x.org/a.mp3 is a clip, not a question"),
        (["no-such.wma"], "no-such.wma: no such file; clips go behind --audio"),
        (["x", "--model", ""], "the model's name is empty"),
        (["x", "--audio", ""], "'': cannot open it"),
        (["x", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["x", "--model", "Qwen/Qwen2-Audio-7B-Instruct"], "Qwen/Qwen2-Audio-7B-Instruct: off"),
        (["--raw", "--audio", "x.wav"], "--raw takes TEXT as the whole prompt"),
        (["--raw", "a <|AUDIO|>"], "1 placeholder <|AUDIO|> for 0 clips"),
        (["x", "--bogus"], "No such option: --bogus"),
        (["x", "y"], "unexpected extra argument(s) (y) (see"),
        (["x", "a/b.flac"], "(a/b.flac); clips go behind --audio (see qwen2audio ask --help)"),
        (["--audio"], "(see qwen2audio ask --help)"),
        (["x", "--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert message in failure(run("ask", *words))


@pytest.mark.parametrize("words", [("chat",), ("ask", "x"), ("transcribe", "QUESTION")])
def test_slips_are_told_of_before_the_model_is_read(run, question, no_model, words):
    words = [question if word == "QUESTION" else word for word in words]
    assert "greedy decoding draws nothing" in failure(
        run(*words, "--greedy", "--temperature", "0.5")
    )
    assert "max_new_tokens is 0" in failure(run(*words, "--max-new-tokens", "0"))


def test_a_question_may_speak_of_a_file(run):
    assert run("ask", "What is in clip.wav", "--max-new-tokens", 1)[0] == 0


@pytest.mark.parametrize(
    ("redirect", "code", "message"),
    [
        (">&-", 2, "error: stdout is closed: there is nowhere to put the answer"),
        ("2>&-", 0, ""),
        ("<&-", 0, ""),
    ],
)
def test_streams_that_are_closed(redirect, code, message):
    command = f"'{sys.executable}' -m qwen2audio_core ask x --max-new-tokens 1 {redirect}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == code and bool(done.stdout) == (code == 0)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_chat_without_lines_to_read():
    command = f"'{sys.executable}' -m qwen2audio_core chat <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "stdin is closed" in done.stderr


def test_a_terminal_that_knows_few_letters():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = ["ask", "x", "--audio", CLIPS / "zh_weather.flac", "--greedy", "--max-new-tokens", "9"]
    done = subprocess.run(
        [sys.executable, "-m", "qwen2audio_core", *map(str, words)],
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0 and done.stdout.isascii()
    said = json.dumps(done.stdout.decode().strip())  # nothing became a question mark
    del environment["PYTHONIOENCODING"]
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    piped = subprocess.run(
        [sys.executable, "-m", "qwen2audio_core", *map(str, words)],
        capture_output=True,
        env=environment,
    )
    whole = piped.stdout.decode().strip()
    assert piped.returncode == 0 and not whole.isascii()
    words = ["rows", CLIPS / "clips.json", "--out", os.fsdecode(b"no\xff")]
    done = subprocess.run(
        [sys.executable, "-m", "qwen2audio_core", *map(str, words)], capture_output=True
    )
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert json.loads(said.replace("\\\\u", "\\u")) == whole


def test_a_prompt_longer_than_the_context(run):
    message = failure(run("ask", "x" * 9000))
    assert "tokens" in message and "8192" in message


def test_version(run):
    assert run("--version") == (0, f"qwen2audio {version('qwen2audio')}\n", "")


def test_an_adapter_or_another_folder_is_no_model(run, tmp_path):
    assert "this folder holds no checkpoint" in failure(run("ask", "x", "--model", tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "adapter"):
        message = failure(run("ask", "x", "--model", folder))
        assert f"first qwen2audio merge {tmp_path / 'adapter'} --out FOLDER" in message


def test_a_clip_that_cannot_be_read_can_be_dropped(tmp_path, question):
    broken = tmp_path / "broken.wav"
    broken.write_text("no sound")
    lines = [f"/audio {broken}", "What?", "/drop", "What?", f"/audio {question} What?", "/exit x"]
    _, complaints, talk = talk_with(assistant.load("random"), lines, max_new_tokens=1)
    assert len(talk.chat.messages) == 2 and not talk.clips
    assert complaints[0].endswith(", or /drop takes the clips of this turn away")
    assert complaints[1].endswith("no such file; the question goes on a line of its own")
    _, complaints, _ = talk_with(assistant.load("random"), [f"/audio {tmp_path}"])
    assert complaints[0].endswith("is a folder")


def test_a_transcript_for_one_file_is_not_put_into_a_folder(run, question, tmp_path):
    file = tmp_path / "talk.srt"
    message = failure(run("transcribe", question, "-o", file))
    assert message.endswith(f"-o is a folder; for the file: -f srt > {file}")
    assert not file.exists()


def test_a_split_is_told_once_in_a_conversation(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "long.wav", torch.randn(16000 * 40).numpy() * 0.1, 16000)
    told = []
    lines = [f"/audio {tmp_path / 'long.wav'}", "What?", "And?"]
    talk_with(assistant.load("random"), lines, max_new_tokens=1, notice=told.append)
    assert len(told) == 1 and "split into 2 pieces" in told[0]


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_no_command_shows_help(run, words):
    code, out, err = run(*words)
    assert code == 0 and "ask" in out and "chat" in out and not err


def test_a_clip_in_the_place_of_the_question(run, question):
    message = failure(run("ask", "--audio", question, "--greedy", question))
    assert "is a clip, not a question" in message


def test_a_cut_answer_says_so(run, question):
    words = ("ask", "x", "--audio", question, "--max-new-tokens", 2)
    assert "cut after 2 tokens by --max-new-tokens" in run(*words)[2]
    assert "cut after" not in run(*words, "--json")[2]


def test_an_answer_cannot_drive_the_terminal(run, monkeypatch):
    hostile = "a\x1b[2J\x9b31m\tb\r\x07\nc"
    monkeypatch.setattr(StopWriter, "push", lambda self, token: hostile)
    monkeypatch.setattr(StopWriter, "finish", lambda self: "")
    words = ("ask", "x", "--max-new-tokens", 1)
    assert run(*words)[1] == "a[2J31m\tb\nc\n"
    assert json.loads(run(*words, "--json")[1])["text"] == hostile
    assert talk_with(assistant.load("random"), ["x"], max_new_tokens=1)[0].endswith(
        "a[2J31m\tb\nc\n\n"
    )


def test_an_operating_system_error_is_one_line(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk")

    monkeypatch.setattr(cli, "load", full)
    assert failure(run("ask", "x")) == "error: /disk: No space left on device"


@pytest.mark.parametrize("command, expected", [("ask", False), ("transcribe", False)])
def test_no_pack(run, monkeypatch, question, command, expected):
    given = []

    def load(*words, pack, quantize):
        given.append(pack)
        raise InputError("enough")

    monkeypatch.setattr(assistant, "load", load)
    for words in ((), ("--no-pack",)):
        asked = "what?" if command == "ask" else question
        assert "enough" in failure(run(command, asked, *words))
    assert given == [None, expected]


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a failure of the test."""

    def load(*words, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(assistant, "load", load)
    monkeypatch.setattr(compare, "find", load)


@pytest.mark.parametrize(
    "words",
    [
        ("ask", "What?", "--audio"),
        ("transcribe",),
        ("compare", "What?", "--audio"),
        ("inspect", "--model", "random"),
    ],
)
def test_a_clip_that_is_not_there_is_told_of_before_the_model_is_read(
    run, no_model, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    for name, why in (
        ("none.wav", "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        ("ftp://host/a.wav", "only http, https, data and file URLs are read, not ftp"),
        (f"file://{tmp_path}/none.wav", "No such file or directory"),
    ):
        message = failure(run(*words, name))
        assert name in message and why in message
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(*words, next(CLIPS.glob("*.flac")))


def test_a_pipe_is_not_opened_before_it_is_heard(tmp_path):
    pytest.importorskip("fcntl")
    os.mkfifo(tmp_path / "pipe")
    check_local(str(tmp_path / "pipe"))  # opened, it would wait here for a writer


def test_transcribe_goes_on_without_what_is_missing(run, question, tmp_path):
    words = ("--max-new-tokens", 4, "--greedy")
    alone = run("transcribe", question, *words)[1]
    code, out, err = run("transcribe", tmp_path / "none.wav", question, *words)
    assert (code, out) == (2, alone)
    assert err.index("none.wav: cannot open it") < err.index("small random model")


def test_what_is_printed_is_known_by_its_file(run, question, no_model):
    both = ("transcribe", question, question)
    for kind in ("srt", "vtt", "tsv"):
        message = failure(run(*both, "-f", kind))
        assert message.startswith(f"error: {kind} of several files would run into one another")
    assert failure(run("transcribe", question, "-f", "srt", "-f", "json")).startswith(
        "error: 2 formats would run into one another: give a folder for them, -o DIR"
    )
    assert failure(run("transcribe", question, "-f", "all")).startswith("error: 5 formats")


def test_several_transcripts_in_json_are_lines(run, question, tmp_path):
    words = ("--max-new-tokens", 4, "--greedy", "-f", "json")
    other = tmp_path / "a b.flac"
    other.write_bytes(question.read_bytes())
    code, out, _ = run("transcribe", question, other, tmp_path / "none.wav", *words)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and [line.pop("file") for line in lines] == [str(question), str(other)]
    lines.append(json.loads(run("transcribe", question, *words)[1]))
    weights = [line["segments"][0].pop("avg_logprob") for line in lines]
    assert lines[0] == lines[1] == lines[2]
    assert max(weights) - min(weights) < 1e-4 and max(weights) < 0


def test_a_translation_is_asked_for(run, question):
    words = ("--max-new-tokens", 4, "--greedy", "-f", "json")
    code, out, _ = run("transcribe", question, "--translate", *words)
    assert code == 0 and json.loads(out)["language"] == "en"


def test_several_transcripts_are_printed_with_their_names_on_stderr(run, question):
    words = ("--max-new-tokens", 4, "--greedy")
    alone = run("transcribe", question, *words)[1]
    code, out, err = run("transcribe", question, question, *words)
    assert code == 0 and out == 2 * alone
    assert err.splitlines().count(f"{question}:") == 2
    assert f"{question}:" not in run("transcribe", question, *words)[2].splitlines()


def test_a_script_can_leave_out_the_notice(run, monkeypatch):
    words = ("ask", "x", "--max-new-tokens", 1)
    assert tiny.WARNINGS["random"] in run(*words)[2]
    monkeypatch.setenv("QWEN2AUDIO_NO_NOTICE", "1")
    assert tiny.WARNINGS["random"] not in run(*words)[2]


def test_the_random_model_is_named_for_what_it_is(run):
    folder = json.loads(run("info", "--model", "random", "--json")[1])["folder"]
    assert Path(folder).name.startswith("random-")


def test_a_reply_shows_itself_in_a_line(model):
    reply = model.ask("x", greedy=True, max_new_tokens=3)
    assert repr(reply) == f"<Reply {reply.text!r}, 3 tokens, length>"
    assert str(reply) == reply.text


def test_compare_knows_its_devices(run):
    assert "device 'gpu' cannot be used" in failure(run("compare", "x", "--device", "gpu"))


def test_names_are_not_markup(run, tmp_path):
    folder = tmp_path / "m[/b][red]"
    folder.parent.mkdir()
    folder.symlink_to(tiny.folder())
    code, out, err = run("info", "--model", folder)
    assert code == 0 and "m[/b][red]" in "".join(out.split()), err
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=100, record=True, file=io.StringIO())
    report = Report("m[/b][red]", "float32", 1e-4, "5", ours="[/b]", theirs="[red]x")
    console.print(report)
    shown = console.export_text()
    assert "m[/b][red], float32" in shown and "[red]x" in shown


def test_transcribe_leaves_nothing_on_stderr(question, tmp_path):
    """Nor does its progress bar, in a terminal, take transcripts away from stdout."""
    clip = tmp_path / "a[red].flac"
    clip.write_bytes(question.read_bytes())
    words = ("transcribe", clip, "--greedy", "--max-new-tokens", 8)
    process = start(*words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.strip()
    assert err.startswith("This is the small random model") and "" not in err.splitlines()
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = start(*words, stderr=slave, env=env)
    os.close(slave)
    assert process.communicate(timeout=60)[0] == out
    seen = b""
    try:
        while block := os.read(master, 4096):
            seen += block
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert b"a[red].flac" in seen


def talk_with(model, lines, **options):
    """The dialogue and the complaints of a conversation in this process, and the Talk."""
    shown, complaints = [], []
    waiting = iter(lines)

    def ask(_):
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    talk = Talk(model, options, ask=ask, show=shown.append, complain=complaints.append)
    talk.run()
    assert next(waiting, None) is None, "it left early"
    return "".join(shown), complaints, talk


def start(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "qwen2audio_core.cli", *with_model(words)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def test_ctrl_c_ends_with_one_line(question):
    process = start("ask", "--audio", question, "--max-new-tokens", 8000)
    assert process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().endswith("interrupted") and "Traceback" not in err


AT_IMPORT = """
import os, signal, sys

class CtrlC:
    def find_spec(name, path=None, target=None):
        if name == os.environ["CTRL_C_AT"]:
            sys.meta_path.remove(CtrlC)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC)
"""


@pytest.mark.parametrize("entry", ["qwen2audio_core", "qwen2audio_core.cli"])
@pytest.mark.parametrize(
    "module", ["typer", "qwen2audio_core.terminal", "torch", "qwen2audio_core.assistant"]
)
def test_ctrl_c_while_a_module_is_imported(entry, module, question, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT)  # Python runs it before the module
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", entry, "ask", "--audio", question, "--max-new-tokens", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CTRL_C_AT": module},
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")


def test_ctrl_c_is_ignored_where_it_was(question, tmp_path):
    """As under nohup: whoever starts us with SIGINT ignored does not want it to end us."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + AT_IMPORT
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "qwen2audio_core", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CTRL_C_AT": "typer"},
    )
    assert done.returncode == 0 and "Qwen2-Audio in plain PyTorch" in done.stdout


def test_a_reader_that_leaves(question):
    process = start("ask", "--audio", question, "--max-new-tokens", 500)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    err = process.stderr.read()
    assert "Traceback" not in err and "Exception ignored" not in err
    process.stderr.close()


def test_chat(question, tmp_path):
    lines = [
        f"/audio {question}",
        "What is this?",
        "/retry",
        "And again?",
        "/nonsense",
        "/audio nowhere.wav",
        f"/save {tmp_path / 'talk.json'}",
        "/system Be brief.",
        "Hello",
        "/save",
        "/exit",
    ]
    process = start("chat", "--greedy", "--max-new-tokens", 6, stdin=subprocess.PIPE)
    _, err = process.communicate("\n".join(lines) + "\n", timeout=120)
    assert process.returncode == 0, err
    assert "unknown command /nonsense, /help lists them" in err
    assert "nowhere.wav: no such file" in err
    assert "/save needs a file" in err
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][0]["content"][0]["audio"] == str(question)


def test_recording(question, tmp_path):
    """/record with a recorder that stands in for a microphone, and without any."""
    recorder = tmp_path / "arecord"
    recorder.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {question} "$last"\nexec sleep 60\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = start("chat", "--max-new-tokens", 4, stdin=subprocess.PIPE, env=environment)
    process.stdin.write("/record\n")
    process.stdin.flush()
    heard = ""
    while not heard.endswith("Enter ends it "):
        heard += process.stdout.read(1)
    time.sleep(1.0)  # speak
    out, err = process.communicate("\nWhat did I say?\n/exit\n", timeout=120)
    assert process.returncode == 0 and "goes with your next turn" in out, err
    assert "error" not in err
    process = start(
        "chat", "--max-new-tokens", 4, stdin=subprocess.PIPE, env={**os.environ, "PATH": "/nowhere"}
    )
    _, err = process.communicate("/record\n/exit\n", timeout=120)
    assert "no recorder found" in err


@pytest.fixture
def model():
    return assistant.load("random")


def test_a_turn_that_is_broken_off_before_its_answer(model, monkeypatch):
    """Ctrl-C, or no memory, while a clip is read and encoded: the conversation goes on."""
    failures = [
        KeyboardInterrupt(),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"),
    ]
    whole = model.encode

    def encode(*args, **kwargs):
        if failures:
            raise failures.pop(0)
        return whole(*args, **kwargs)

    monkeypatch.setattr(model, "encode", encode)
    out, complaints, talk = talk_with(model, ["a", "b", "c", "d"], max_new_tokens=2)
    assert out.count(" [stopped]\n") == 1
    assert len(complaints) == 2
    assert all(line.startswith("error: out of memory: ") for line in complaints)
    assert "\n" not in complaints[1]
    assert [m["role"] for m in talk.chat.messages] == ["user", "assistant"]
    failures.append(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        talk_with(model, ["a"])


def test_a_full_context_advises_to_clear(model):
    long = "x " * 9000
    alone = talk_with(model, [long])[1]
    assert len(alone) == 1 and "context" in alone[0] and "/clear" not in alone[0]
    behind = talk_with(model, ["a", long], max_new_tokens=1)[1]
    assert len(behind) == 1 and behind[0].endswith("or /clear forgets the conversation")


def test_file_names_as_they_are_typed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("two words.wav", "it's.wav", "a\\b.wav"):
        (tmp_path / name).touch()
        assert file_name(name) == name
    assert file_name("two\\ words.wav") == file_name("'two words.wav'") == "two words.wav"
    assert file_name("it\\'s.wav") == file_name('"it\'s.wav"') == "it's.wav"
    assert file_name("~/it\\'s.wav") == str(tmp_path / "it's.wav")
    lines = [f"/audio {'x' * 5000}", "/audio ~nouser/x", "/save ~nouser/x", f"/save {'x' * 5000}"]
    out, complaints, _ = talk_with(model, lines)
    assert [line.split(": ")[0] for line in complaints] == ["error"] * 4
    assert "Written" not in out and max(map(len, complaints)) < 400
    assert len(list(tmp_path.iterdir())) == 3


def test_save_keeps_recordings_and_files(model, question, tmp_path, monkeypatch):
    monkeypatch.chdir(question.parent)
    take = tmp_path / "take.wav"
    take.write_bytes(question.read_bytes())

    def record(self):
        path = Path(self._recordings.name) / "recorded.wav"
        path.write_bytes(take.read_bytes())
        return str(path)

    monkeypatch.setattr(Talk, "record", record)
    place = tmp_path / "talk.json"
    lines = ["/record", f"/audio {question.name}", "Who?", f"/save {place}", f"/save {place}"]
    _, complaints, _ = talk_with(model, lines, max_new_tokens=1)
    assert len(complaints) == 1 and "talk.json exists already" in complaints[0]
    content = json.loads(place.read_text())["messages"][0]["content"]
    copy = tmp_path / "talk-1.wav"
    assert [item["audio"] for item in content[:2]] == [str(copy), str(question.resolve())]
    assert copy.read_bytes() == take.read_bytes()
    place.unlink()
    _, complaints, _ = talk_with(model, lines[:4], max_new_tokens=1)
    assert len(complaints) == 1 and "talk-1.wav exists already" in complaints[0]
    assert not place.exists()
    gone = [*lines[:3], f"/save {tmp_path}/nowhere/talk.json"]
    _, complaints, _ = talk_with(model, gone, max_new_tokens=1)
    assert "cannot write it (No such file or directory)" in complaints[0]
