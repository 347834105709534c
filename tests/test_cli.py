"""The command line as a person meets it: what it prints where, and how it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen2audio_core import cli, tiny

CLIPS = Path(cli.__file__).parent / "assets" / "clips"


@pytest.fixture(autouse=True, scope="module")
def one_cache(tmp_path_factory):
    """The tiny checkpoint is made once, in a folder of these tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def run(monkeypatch, capsys):
    """run("ask", ...) -> (exit code, stdout, stderr), in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qwen2audio", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def failure(result):
    """The one line of a failed call, which wrote nothing to stdout."""
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("tiny is a small random")]
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
        out = run("ask", "--audio", clip, "--greedy", "--max-new-tokens", 16, "--json")[1]
        ids.add(tuple(json.loads(out)["ids"]))
    assert len(ids) == 3


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


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "nothing was asked: give a text, a clip, or both"),
        (["x", "--temperature", "0"], "temperature is 0.0, it must be above 0"),
        (["x", "--greedy", "--temperature", "1"], "greedy decoding draws nothing"),
        (["x", "--top-p", "2"], "top_p is 2.0, it must be"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens is 0, it must be at least 1"),
        (["x", "--audio", "no-such.wav"], "no-such.wav"),
        (["x", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["x", "--model", "Qwen/Qwen2-Audio-7B-Instruct"], "Qwen/Qwen2-Audio-7B-Instruct: off"),
        (["--raw", "--audio", "x.wav"], "--raw takes TEXT as the whole prompt"),
        (["--raw", "a <|AUDIO|>"], "1 placeholder <|AUDIO|> for 0 clips"),
        (["x", "--bogus"], "No such option: --bogus"),
        (["x", "y"], "unexpected extra argument"),
        (["x", "--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert message in failure(run("ask", *words))


def test_a_prompt_longer_than_the_context(run):
    message = failure(run("ask", "x" * 9000))
    assert "tokens" in message and "8192" in message


def test_no_command_shows_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "ask" in out and "chat" in out


def start(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "qwen2audio_core.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_ends_with_one_line(question):
    process = start("ask", "--audio", question, "--max-new-tokens", 8000)
    assert process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().endswith("interrupted") and "Traceback" not in err


def test_ctrl_c_while_loading(question):
    process = start("ask", "--audio", question, "--max-new-tokens", 8000)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_a_reader_that_leaves(question):
    process = start("ask", "--audio", question, "--max-new-tokens", 500)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in process.stderr.read()
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
    out, err = process.communicate("\n".join(lines) + "\n", timeout=120)
    assert process.returncode == 0, err
    assert "unknown command /nonsense, /help lists them" in out
    assert "nowhere.wav: no such file" in out
    assert "/save needs a file" in out
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][0]["content"][0]["audio"] == str(question)


def test_recording(question, tmp_path):
    """/record with a recorder that stands in for a microphone, and without any."""
    recorder = tmp_path / "arecord"
    recorder.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {question} "$last"\nsleep 60\n')
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
    assert "error" not in out
    process = start(
        "chat", "--max-new-tokens", 4, stdin=subprocess.PIPE, env={**os.environ, "PATH": "/nowhere"}
    )
    out, _ = process.communicate("/record\n/exit\n", timeout=120)
    assert "no recorder found" in out
