"""The web demo without a browser: conversations, limits, files, the line before the model, and the
server as a program speaks to it."""

import asyncio
import html
import http.cookiejar
import io
import json
import math
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import wave
import zlib
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest
import torch

from qwen2audio_core import assistant, audio, cli, install, tiny
from qwen2audio_core.assistant import Latest
from qwen2audio_core.errors import AudioError, InputError
from qwen2audio_core.frontend import log_mel
from qwen2audio_core.hosts import own_names
from qwen2audio_core.web import guard, pictures, server, views
from qwen2audio_core.web.inside import inspect
from qwen2audio_core.web.sessions import Limits, Session, Sessions, Turn
from qwen2audio_core.web.words import LANGUAGES, preferred, words
from qwen2audio_core.web.worker import Job, Worker

CLIPS = Path(cli.__file__).parent / "assets" / "clips"
BELL, TRAIN = CLIPS / "sound_bell.flac", CLIPS / "en_train.flac"
SHORT = {"greedy": True, "max_new_tokens": 6}

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory):
    """The tiny checkpoint is made once, in a folder of these tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(one_cache):
    return assistant.load("random")


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def sessions(model, worker, tmp_path):
    sessions = Sessions(model, worker, tmp_path / "web")
    yield sessions
    sessions.close()


@pytest.fixture
def page(sessions) -> Session:
    return sessions.of("page")


def finish(page: Session) -> None:
    assert page.job is not None and page.job.wait(60)
    assert page.job.error == ""


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


class Hold:
    """Work that keeps the worker until it is let go."""

    def __init__(self, worker: Worker):
        self.begun, self.go = threading.Event(), threading.Event()
        self.job = worker.submit(self.work)
        assert self.begun.wait(10)

    def work(self, job: Job) -> None:
        self.begun.set()
        while not (self.go.wait(0.01) or job.stopped):
            pass


# --- Words


def test_both_languages_say_the_same_things():
    english, chinese = words("en"), words("zh")
    assert english.keys() == chinese.keys() and set(LANGUAGES) == {"en", "zh"}
    for name, text in english.items():
        fields = [
            [f[1:3] for f in Formatter().parse(t) if f[1] is not None]
            for t in (text, chinese[name])
        ]
        assert text and chinese[name] and fields[0] == fields[1], name
        assert not re.search(r"[\u4e00-\u9fff]", text), name
        assert name == "error" or re.search(r"[\u4e00-\u9fff]|token", chinese[name]), name


def test_every_text_is_used_and_every_used_text_exists():
    sources = [
        file.read_text()
        for file in Path(guard.__file__).parent.glob("*.py")
        if file.name != "words.py"
    ]
    named = {
        name for source in sources for name in re.findall(r"""["']([a-z][a-z ]*)["']""", source)
    } | tiny.WARNINGS.keys()
    used = {
        name
        for source in sources
        for name in re.findall(r"""\b(?:w|words)\[["'](.+?)["']\]""", source)
    }
    assert used <= words("en").keys() <= named


@pytest.mark.parametrize(
    "header, expected",
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("de-DE,de;q=0.9,en;q=0.8,zh;q=0.7", "en"),
        ("de, zh;q=0.3, en;q=0.2", "zh"),
        ("fr", "en"),
        ("zh;q=x, ;;,", "en"),
    ],
)
def test_the_language_a_browser_asks_for(header, expected):
    assert preferred(header) == expected


# --- Pictures


def read_png(data: bytes) -> tuple[torch.Tensor, bytes]:
    """The indices and the palette; every checksum is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 3) and list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8)
    rows = rows.view(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], chunks[b"PLTE"]


def test_a_spectrogram_shows_the_log_mel():
    tone = 0.5 * torch.sin(torch.arange(16_000) * 2 * torch.pi * 1000 / 16_000)
    pixels, palette = read_png(pictures.spectrogram([tone]))
    mel = log_mel(tone)
    assert pixels.shape == mel.shape
    loudest = pixels.float().mean(1).argmax()
    assert loudest == 127 - mel.mean(1).argmax()  # low notes below
    assert pixels.max() == 255 and len(palette) == 768
    light = torch.tensor(list(palette)).view(256, 3).float() @ torch.tensor(
        [0.2126, 0.7152, 0.0722]
    )
    assert (light.diff() > -0.5).all() and light[-1] > 240 and light[0] < 5


def test_a_long_spectrogram_is_narrowed_and_keeps_its_peaks():
    pieces = [torch.zeros(480_000), torch.zeros(480_000)]
    pieces[1][240_000] = 1.0
    pixels, _ = read_png(pictures.spectrogram(pieces))
    assert pixels.shape == (128, pictures.MAX_WIDTH)
    assert pixels.float().mean(0).argmax() in range(895, 906)  # at 45 of 60 s


def test_what_is_played_is_what_is_heard(tmp_path):
    pieces = [torch.linspace(-1.5, 1.5, 1000), torch.zeros(500)]
    pictures.write_wav(tmp_path / "x.wav", pieces)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (1, 16_000, 1500)
    heard = audio.load(tmp_path / "x.wav")
    assert (heard - torch.cat(pieces).clamp(-1, 1)).abs().max() < 1e-4


def test_a_card_shows_hostile_names_as_text():
    name = '<script>alert(1)</script>" onerror="x'
    html = pictures.clip_card(
        name, "1 s & 2", Path("/a b/clip-1.wav"), Path("/a/clip-1.png"), "Remove"
    )
    assert "<script" not in html and 'onerror="x' not in html.replace("&quot;", "")
    assert "1 s &amp; 2" in html and "gradio_api/file=/a%20b/clip-1.wav" in html
    assert 'data-clip="clip-1.wav"' in html
    assert "button" not in pictures.clip_card("x", "", Path("a.wav"), Path("a.png"))


# --- The line before the model


def test_jobs_run_one_at_a_time_in_their_order(worker):
    running, most, order = [], [], []

    def work(job: Job) -> None:
        running.append(job)
        most.append(len(running))
        time.sleep(0.01)
        order.append(job)
        running.remove(job)

    hold = Hold(worker)
    jobs = [worker.submit(work) for _ in range(5)]
    assert [worker.place(job) for job in [hold.job, *jobs]] == [0, 1, 2, 3, 4, 5]
    jobs[1].stop()  # it leaves the line at once, for those behind it too
    assert [worker.place(job) for job in jobs] == [1, 2, 2, 3, 4]
    hold.go.set()
    assert all(job.wait(10) for job in jobs)
    assert order == [jobs[0], *jobs[2:]] and set(most) == {1}
    assert worker.place(jobs[4]) == 0


def test_a_line_that_is_too_long():
    worker = Worker(waiting=2)
    hold = Hold(worker)
    for _ in range(2):
        worker.submit(lambda job: None)
    with pytest.raises(InputError, match="2 answers are waited for already"):
        worker.submit(lambda job: None)
    hold.go.set()
    worker.close()
    with pytest.raises(InputError, match="closing"):
        worker.submit(lambda job: None)


def test_work_that_fails_is_one_line_and_the_next_one_runs(worker, capsys):
    def fail(error: Exception):
        def work(job: Job) -> None:
            raise error

        job = worker.submit(work)
        assert job.wait(10)
        return job.error

    assert fail(InputError("no such thing")) == "no such thing"
    assert (
        fail(RuntimeError("CUDA out of memory. Tried\nto"))
        == "out of memory: CUDA out of memory. Tried"
    )
    assert fail(MemoryError()).startswith("out of memory: ")
    secret = fail(ValueError("/home/secret"))
    assert "secret" not in secret and "log" in secret
    assert "/home/secret" in capsys.readouterr().err
    assert worker.submit(lambda job: None).wait(10)


def test_closing_ends_what_runs_and_what_waits():
    worker = Worker()
    hold = Hold(worker)
    later = worker.submit(lambda job: pytest.fail("it ran"))
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 5 and hold.job.done and later.done and later.error == ""


# --- A conversation


def test_answers_are_those_of_the_assistant(page, model):
    page.add(BELL)
    page.ask("What is that?", **SHORT)
    assert page.clips == []
    finish(page)
    talk = model.chat()
    assert page.turns[-1].answer == talk.say("What is that?", BELL, **SHORT).text
    page.add(TRAIN)
    page.ask("", **SHORT)  # the clip asks; the first one is still part of the conversation
    finish(page)
    reply = talk.say(None, TRAIN, **SHORT)
    assert page.turns[-1].answer == reply.text
    assert page.turns[-1].reply.prompt.ids == reply.prompt.ids
    assert [clip.name for turn in page.turns for clip in turn.clips] == [
        "sound_bell.flac",
        "en_train.flac",
    ]


def test_settings_reach_the_model(page, model):
    options = {"temperature": 1.5, "max_new_tokens": 12, "seed": 3}
    page.ask("Hello", system="Be brief.", **options)
    finish(page)
    expected = model.ask("Hello", system="Be brief.", **options)
    assert page.turns[0].answer == expected.text and expected.ids == page.turns[0].reply.ids
    assert expected.text != model.ask("Hello", system="Be brief.", **{**options, "seed": 4}).text


def test_several_clips_and_a_long_one(page, model, tmp_path):
    long = tmp_path / "long.wav"
    soundfile.write(long, torch.randn(16_000 * 31).numpy() * 0.1, 16_000)
    assert page.add(BELL) == []
    (notice,) = page.add(long)
    assert notice.startswith("long.wav is 31.0 s long: split into 2 pieces")
    assert [len(clip.pieces) for clip in page.clips] == [1, 2]
    assert page.clips[1].seconds == pytest.approx(31.0)
    page.ask("Which?", **SHORT)
    finish(page)
    reply = model.ask("Which?", [BELL, long], notice=lambda line: None, **SHORT)
    assert page.turns[0].reply.prompt.ids == reply.prompt.ids
    assert page.turns[0].answer == reply.text


def test_retry_replaces_the_answer(page):
    page.ask("Hello", temperature=2.0, seed=1, max_new_tokens=12)
    finish(page)
    first = page.turns[0].answer
    page.retry(temperature=2.0, seed=2, max_new_tokens=12)
    finish(page)
    assert len(page.turns) == 1 and page.turns[0].answer != first
    page.retry(temperature=2.0, seed=1, max_new_tokens=12)
    finish(page)
    assert page.turns[0].answer == first


def test_edit_takes_the_last_turn_back(page, model):
    page.add(BELL)
    page.ask("One", **SHORT)
    finish(page)
    page.add(TRAIN)
    page.ask("Two", **SHORT)
    finish(page)
    assert page.edit() == "Two"
    assert [clip.name for clip in page.clips] == ["en_train.flac"] and len(page.turns) == 1
    page.ask("Three", **SHORT)
    finish(page)
    talk = model.chat()
    talk.say("One", BELL, **SHORT)
    assert page.turns[1].answer == talk.say("Three", TRAIN, **SHORT).text
    page.edit(), page.edit()
    assert [clip.name for clip in page.clips] == ["sound_bell.flac", "en_train.flac"]
    with pytest.raises(InputError, match="no turn to edit"):
        page.edit()


def test_stop_keeps_what_was_written(page, model, worker):
    page.ask("Hello", greedy=True, max_new_tokens=2000)
    deadline = time.monotonic() + 30
    while not page.turns[0].answer and time.monotonic() < deadline:
        time.sleep(0.005)
    began = time.monotonic()
    page.stop()
    kept = page.turns[0].answer
    assert kept and not page.busy and page.turns[0].stopped
    assert page.job.wait(10) and time.monotonic() - began < 2
    assert page.turns[0].answer == kept  # nothing came after it
    page.ask("And?", **SHORT)
    finish(page)
    asked = {"role": "user", "content": "Hello"}
    messages = [asked, {"role": "assistant", "content": kept}, {"role": "user", "content": "And?"}]
    assert page.turns[1].answer == model.stream_messages(messages, **SHORT).finished()[0].text


def test_stop_while_waiting_in_the_line(page, worker):
    hold = Hold(worker)
    page.ask("Hello", **SHORT)
    assert worker.place(page.job) == 1 and page.busy
    assert views.answer(page, page.turns[0]) == "<em>In line, 1 before you …</em>"
    page.stop()
    assert not page.busy and views.answer(page, page.turns[0]) == "<em>(stopped)</em>"
    hold.go.set()
    assert page.job.wait(10) and page.turns[0].answer == ""


def test_only_one_answer_at_a_time(page, worker):
    hold = Hold(worker)
    page.ask("Hello", **SHORT)
    for act in (lambda: page.ask("More", **SHORT), lambda: page.retry(**SHORT), page.edit):
        with pytest.raises(InputError, match="still being written"):
            act()
    assert len(page.turns) == 1
    hold.go.set()
    finish(page)


def test_a_slip_costs_nothing(page):
    with pytest.raises(InputError, match="Nothing was asked yet"):
        page.ask("  ", **SHORT)
    with pytest.raises(InputError, match="no turn to try again"):
        page.retry(**SHORT)
    page.add(BELL)
    for options, wrong in (
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "it must be 0 to"),
    ):
        with pytest.raises(InputError, match=wrong):
            page.ask("What?", **options)
    with pytest.raises(InputError, match="tokens"):
        page.ask("x " * 9000, **SHORT)
    assert page.turns == [] and len(page.clips) == 1 and not page.busy
    page.ask("What?", **SHORT)
    finish(page)


def test_a_model_that_fails_gives_the_turn_back(page, monkeypatch):
    page.add(BELL)
    page.ask("One", **SHORT)
    finish(page)
    before = list(page.turns)

    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(page.assistant, "stream_prompts", full)
        page.add(TRAIN)
        page.ask("Two", **SHORT)
        assert page.job.wait(10)
        assert page.job.error.startswith("out of memory")
        assert page.turns == before and [clip.name for clip in page.clips] == ["en_train.flac"]
        page.retry(**SHORT)
        assert page.job.wait(10)
        assert page.turns == before and page.turns[0].answer
    page.ask("Two", **SHORT)
    finish(page)


def test_remove_and_clear_remove_the_files(page, sessions):
    for clip in (BELL, TRAIN, BELL):
        page.add(clip)
    assert len(files(sessions.folder)) == 6
    page.remove(page.clips[0].wav.name)
    page.remove("../../etc/passwd")
    assert [clip.name for clip in page.clips] == ["en_train.flac", "sound_bell.flac"]
    assert len(files(sessions.folder)) == 4
    page.ask("Hello", **SHORT)
    page.clear()
    assert page.turns == [] == page.clips and files(sessions.folder) == [] and not page.busy


# --- Limits


def test_limits_of_a_turn(model, worker, tmp_path):
    limits = Limits(upload_bytes=100_000, seconds=5.0, clips=3)
    page = Session(model, worker, tmp_path / "page", limits, Latest())
    page.add(BELL)
    with pytest.raises(AudioError, match=r"longer than the 2\.5 s allowed here"):
        page.add(TRAIN)  # 2.5 and 3.4 s
    page.add(CLIPS / "en_capital.flac")
    short = tmp_path / "short.wav"
    soundfile.write(short, torch.zeros(400).numpy(), 16_000)
    page.add(short)
    with pytest.raises(InputError, match="up to 3 clips"):
        page.add(short)
    page.clear()
    large = tmp_path / "large.wav"
    large.write_bytes(bytes(100_001))
    with pytest.raises(AudioError, match="up to 0 MB"):
        page.add(large)
    packed = tmp_path / "hours.flac"  # 80 kB that unpack to 20 minutes
    soundfile.write(packed, torch.zeros(16_000 * 1200).numpy(), 16_000)
    assert packed.stat().st_size < 100_000
    with pytest.raises(AudioError, match="longer than the 5 s allowed"):
        page.add(packed)
    assert page.clips == [] and files(tmp_path / "page") == []


def broken(number: int) -> bytes:
    """Sound files that are none: noise, other formats, real ones cut or overwritten somewhere."""
    chance = random.Random(number)
    clip = sorted(CLIPS.glob("*.flac"))[number % 14].read_bytes()
    wav = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        2**31,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        16_000,
        32_000,
        2,
        16,
        b"data",
        2**30,
    )
    kinds = (
        b"",
        chance.randbytes(2000),
        b"<html>404</html>",
        clip[: chance.randrange(4, len(clip) // 2)],
        wav + b"\x00\x01" * chance.randrange(100),
        b"\x89PNG\r\n\x1a\n" + chance.randbytes(500),
        b"ID3\x04" + chance.randbytes(300),
        b"OggS" + chance.randbytes(900),
        b"PK\x03\x04" + chance.randbytes(400),
        b"\x00\x00\x00\x20ftypM4A " + chance.randbytes(700),
    )
    return kinds[number % len(kinds)]


def test_a_hundred_broken_files(page, tmp_path):
    for number in range(100):
        file = tmp_path / f"broken-{number}.{('wav', 'mp3', 'flac', 'm4a', 'ogg')[number % 5]}"
        file.write_bytes(broken(number))
        with pytest.raises(AudioError) as caught:
            page.add(file)
        assert len(str(caught.value).splitlines()) == 1 and file.name in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    page.add(BELL)
    page.ask("Still there?", **SHORT)
    finish(page)


# --- Many pages


def test_pages_do_not_know_of_each_other(sessions):
    one, two = sessions.of("one"), sessions.of("two")
    one.add(BELL)
    one.ask("Mine", **SHORT)
    finish(one)
    assert two.turns == [] == two.clips and sessions.of("one") is one
    assert one.folder != two.folder and "one" not in one.folder.name
    two.remove(one.turns[0].clips[0].wav.name)
    two.clear()
    assert len(files(sessions.folder)) == 2
    with pytest.raises(InputError, match="which page"):
        sessions.of(None)


def test_a_turn_is_not_read_from_the_beginning(sessions, model):
    """As long as no other page asks meanwhile; and nothing is taken for what another one said."""
    one, two = sessions.of("one"), sessions.of("two")
    for page, clip in ((one, BELL), (one, None), (two, TRAIN), (one, None), (two, None)):
        if clip:
            page.add(clip)
        page.ask("What is that?", **SHORT)
        finish(page)
    assert [bool(turn.reply.reused) for turn in one.turns] == [False, True, True]
    assert one.turns[1].reply.reused > one.turns[2].reply.reused  # that one shares the beginning
    for page in (one, two):
        messages = [message for turn in page.turns for message in turn.messages()]
        whole = model.stream_messages(messages[:-1], **SHORT).finished()[0]
        assert page.turns[-1].answer == whole.text
    one.clear()
    assert sessions._latest._kept is None


def test_a_page_that_is_left_frees_the_model_and_is_forgotten(model, worker, tmp_path):
    limits = Limits(closed=0.2, idle=60.0, upload=60.0)
    sessions = Sessions(model, worker, tmp_path, limits)
    page = sessions.of("page")
    page.add(BELL)
    page.ask("Hello", greedy=True, max_new_tokens=4000)
    sessions.leave("page")
    sessions.leave("never seen")
    assert page.job.wait(10) and not page.busy
    sessions.sweep()
    assert len(sessions) == 1 and len(files(tmp_path)) == 2  # its connection may come back
    assert sessions.of("page") is page
    time.sleep(0.3)
    sessions.sweep()
    assert len(sessions) == 1  # it did
    sessions.leave("page")
    time.sleep(0.3)
    sessions.sweep()
    assert len(sessions) == 0 and files(tmp_path) == []
    assert sessions.of("page").turns == []


def test_idle_pages_and_too_many(model, worker, tmp_path):
    sessions = Sessions(model, worker, tmp_path, Limits(pages=3, idle=0.2))
    for name in "abc":
        sessions.of(name).add(BELL)
    first = sessions.of("a")
    assert len(files(tmp_path)) == 6
    sessions.of("d")  # b is the one that was longest unused
    assert len(sessions) == 3 and sessions.of("a") is first and len(files(tmp_path)) == 4
    time.sleep(0.3)
    sessions.sweep()
    assert len(sessions) == 0 and files(tmp_path) == []


def test_uploads_are_removed_after_a_while(sessions):
    page = sessions.of("page")
    page.add(BELL)
    old, new = (sessions.folder / name / "clip.wav" for name in ("old", "new"))
    for file in (old, new):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    long_ago = time.time() - sessions.limits.upload - 10
    os.utime(old, (long_ago, long_ago))
    for file in page.folder.iterdir():
        os.utime(file, (long_ago, long_ago))
    sessions.sweep()
    assert not old.exists() and not old.parent.exists() and new.exists()
    assert len(list(page.folder.iterdir())) == 2
    sessions.close()
    assert not sessions.folder.exists()


# --- What the server lets through


def through(scope: dict, chunks: list[bytes] = [b""], **limits: int) -> tuple[list, list[bytes]]:  # noqa: B006
    """Send one request through the guard: what came back, and what the application read."""
    sent, read = [], []
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks)}
        for i, chunk in enumerate(chunks, 1)
    ]

    async def app(scope, receive, send):
        while waiting:
            message = await receive()
            if message["type"] == "http.disconnect":
                read.append(None)
                break
            read.append(message["body"])
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"X-Content-Type-Options", b"?")],
            }
        )

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    whole = {"type": "http", "headers": [], **scope}
    asyncio.run(guard.Guard(app, **{"max_bytes": 10**6, **limits})(whole, receive, send))
    return sent, read


def test_every_answer_forbids_other_hosts():
    sent, _ = through({"path": "/"})
    headers = dict(sent[0]["headers"])
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'; ")
    assert not re.search(rb"https?:|\*", headers[b"content-security-policy"])
    assert headers[b"x-content-type-options"] == b"nosniff" and len(sent[0]["headers"]) == 3


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=http://x/y", "/gradio_api/file=https://x/y", "/gradio_api/proxy=https://x"],
)
def test_nothing_is_fetched_for_others(path):
    sent, read = through({"path": path})
    assert sent[0]["status"] == 403 and read == []


def test_large_bodies_are_refused():
    stated = {"headers": [(b"content-length", b"2000000")]}
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        sent, read = through({"path": path, **stated}, [bytes(500_000)] * 4)
        assert sent[0]["status"] == 413 and read == []
    assert (
        through({"path": "/gradio_api/upload", **stated}, max_bytes=2_000_000)[0][0]["status"]
        == 200
    )
    assert through({"path": "/gradio_api/queue/join"}, [bytes(600_000)] * 3)[1] == [
        bytes(600_000),
        None,
    ]


def test_this_machine_s_own_page_has_its_own_names():
    """A web page whose name points to this machine gets nothing, nor may others send anything."""
    hosts = own_names("127.0.0.1")

    def status(*headers: tuple[bytes, bytes], method: str = "POST", hosts=hosts) -> int:
        scope = {"path": "/gradio_api/upload", "headers": list(headers), "method": method}
        return through(scope, hosts=hosts)[0][0]["status"]

    for name in (b"localhost:7860", b"127.0.0.1", b"[::1]:7860", b"LOCALHOST"):
        assert status((b"host", name)) == 200
    for name in (b"evil.example:7860", b"", b"[", b"127.0.0.1.evil.example"):
        assert status((b"host", name)) == 403
    assert status((b"host", b"any.example"), hosts=None) == 200
    own = (b"host", b"localhost")
    for site in (b"cross-site", b"same-site"):
        assert status(own, (b"sec-fetch-site", site)) == 403
        assert status(own, (b"sec-fetch-site", site), method="GET") == 200  # a link to the page
    for site in (b"same-origin", b"none"):
        assert status(own, (b"sec-fetch-site", site)) == 200


def test_uploads_together_have_an_end(sessions, page):
    def status(size: int, room: int, path: str = "/gradio_api/upload") -> int:
        headers = [(b"content-length", b"%d" % size)]
        return through({"path": path, "headers": headers}, room=lambda: room)[0][0]["status"]

    assert status(1000, 1000) == 200 and status(1001, 1000) == 507
    assert status(1001, 1000, "/gradio_api/queue/join") == 200
    page.add(BELL)
    kept = sessions.stored
    assert kept == sum(file.stat().st_size for file in sessions._files()) > 10_000
    page.clear()
    assert sessions.stored < kept


def test_what_is_said_stands_there_to_the_letter(page):
    """Nothing that was typed or answered is taken for HTML or Markdown."""
    for text in ("a <noise> hello [laughs] b", "x<y and y>x", "__init__.py 2*3*4", "a & b"):
        page.turns.append(Turn(text, [], answer=text))
        shown = views.history(page)
        assert html.unescape(shown[-1]["content"]) == text == html.unescape(shown[-2]["content"][0])
        assert "<" not in shown[-1]["content"] and "<" not in shown[-2]["content"][0]


def test_a_conversation_that_is_full_says_so(page):
    page.turns.append(Turn("x " * 9000, [], answer="y"))
    with pytest.raises(InputError, match="as long as the model can hear: clear it, or edit"):
        page.ask("and now?", greedy=True)
    with pytest.raises(InputError, match="the prompt has"):
        page.ask("z " * 9000, greedy=True)


@pytest.mark.parametrize(
    "host, share, password, expected",
    [
        ("127.0.0.1", False, None, []),
        ("localhost", False, None, []),
        ("::1", False, None, []),
        (
            "0.0.0.0",
            False,
            None,
            ["anyone who can reach this machine can use the model, set --password", "microphone"],
        ),
        ("0.0.0.0", False, "x", ["whoever knows it", "microphone"]),
        ("127.0.0.1", True, None, ["through Gradio's servers, open to anyone"]),
    ],
)
def test_warnings(host, share, password, expected):
    found = server.warnings(host, share, password)
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def test_ports_and_hosts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is taken"):
            server.free_port("127.0.0.1", port)
    assert server.free_port("127.0.0.1", port) == port
    assert server.free_port("127.0.0.1", None) >= server.PORT
    for host, wrong in (("no such host", "is not known"), ("192.0.2.1", "not an address of this")):
        with pytest.raises(InputError, match=wrong):
            server.free_port(host, None)


# --- The server, as a program speaks to it


class Browser:
    """One page of the served demo: uploads, and the events of its components."""

    def __init__(self, address: str):
        self.address = address
        self.page = secrets.token_hex(8)
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)

    def send(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with self.opener.open(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, name: str, content: bytes) -> tuple[int, bytes]:
        line = secrets.token_hex(16)
        head = (
            f'--{line}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        )
        body = head.encode() + content + f"\r\n--{line}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={line}"}
        return self.send("/gradio_api/upload", body, **kind)

    def file(self, name: str, content: bytes) -> dict:
        status, body = self.upload(name, content)
        assert status == 200, body
        return {
            "path": json.loads(body)[0],
            "orig_name": name,
            "meta": {"_type": "gradio.FileData"},
        }

    def config(self) -> dict:
        return json.loads(self.send("/config")[1])

    def event(
        self, element: str, event: str, *data: object, event_data: object = None
    ) -> dict[str, object]:
        """Trigger one; returns the last value of each of its outputs, by their elements' ids."""
        config = self.config()
        parts = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        found = [
            call
            for call in config["dependencies"]
            if any(parts.get(of) == element and kind == event for of, kind in call["targets"])
        ]
        call = {
            "data": data,
            "fn_index": found[0]["id"],
            "session_hash": self.page,
            "event_data": event_data,
        }
        kind = {"Content-Type": "application/json"}
        status, body = self.send("/gradio_api/queue/join", json.dumps(call).encode(), **kind)
        assert status == 200, body
        _, stream = self.send(f"/gradio_api/queue/data?session_hash={self.page}")
        lines = [
            json.loads(line[5:])
            for line in stream.decode().splitlines()
            if line.startswith("data:")
        ]
        (end,) = (line for line in lines if line["msg"] == "process_completed")
        assert end["success"], end
        return dict(
            zip((parts[out] for out in found[0]["outputs"]), end["output"]["data"], strict=True)
        )


def knobs(tokens: int = 6) -> list:
    return [None, 0, tokens, None]


@pytest.fixture(scope="module")
def served(model) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the page needs gradio")
    limits = Limits(upload_bytes=2**20, closed=0.2, upload=60.0)
    with server.serving(model, limits=limits) as addresses:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", addresses[0]) and len(addresses) == 1
        yield addresses[0]
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


def test_the_page_is_served_and_names_no_other_host(served):
    browser = Browser(served)
    with browser.opener.open(served) as response:
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        html = response.read().decode()
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//(?!127)", html)
    assert (
        "fonts.googleapis" not in html and "@import" not in browser.send("/theme.css")[1].decode()
    )
    config = browser.config()
    assert config["analytics_enabled"] is False


def test_a_turn_over_http(served, model):
    browser = Browser(served)
    clip = browser.file("bell.flac", BELL.read_bytes())
    shown = browser.event("q2a-upload", "upload", [clip])
    assert "bell.flac" in shown["q2a-waiting"] and shown["q2a-upload"] is None
    shown = browser.event("q2a-send", "click", "What is that?", *knobs())
    assert (
        shown["q2a-chat"][-1]["content"][0]["text"]
        == model.ask("What is that?", BELL, **SHORT).text
    )
    assert shown["q2a-waiting"] == "" and "6 tokens" in shown["q2a-status"]
    card = shown["q2a-chat"][0]["content"][0]["value"]
    wav, picture = (re.search(rf'src="(\S+?\.{kind})"', card)[1] for kind in ("wav", "png"))
    assert (
        browser.send("/" + wav)[1][:4] == b"RIFF" and browser.send("/" + picture)[1][1:4] == b"PNG"
    )
    other = Browser(served).event("q2a-retry", "click", *knobs())
    assert other["q2a-chat"] == [] and "no turn to try again" in other["q2a-status"]


def test_settings_of_the_page(served, model):
    browser = Browser(served)
    for seed, wrong in (
        ("-1", "whole number"),
        ("1.5", "whole number"),
        ("9" * 19, "it must be 0"),
    ):
        shown = browser.event("q2a-send", "click", "Hello", None, 1.0, 6, seed)
        assert wrong in shown["q2a-status"] and shown["q2a-chat"] == []
    shown = browser.event("q2a-send", "click", "Hello", " Be brief. ", 1.5, 12, " 7 ")
    options = {"temperature": 1.5, "max_new_tokens": 12, "seed": 7}
    expected = model.ask("Hello", system="Be brief.", **options).text
    assert shown["q2a-chat"][-1]["content"][0]["text"].split() == expected.split()


def test_looking_inside(served, model):
    browser = Browser(served)
    assert "no answer yet" in browser.event(*inside())["q2a-inside"]
    browser.event("q2a-send", "click", "Hello", *knobs(3))
    shown = browser.event(*inside())["q2a-inside"]
    reply = model.ask("Hello", greedy=True, max_new_tokens=3, logprobs=5)
    sure = [math.exp(likelihood.logprob) for likelihood in reply.logprobs]
    assert [f"{p:.3f}" for p in sure] == re.findall(r"--sure:([\d.]+)", shown)
    assert shown.count("<li") == 15 and "<script" not in shown
    assert re.search(r'class="q2a-text">Hello</span>', shown)
    assert re.search(r'class="q2a-template">&lt;\|im_start\|&gt;system', shown)
    shown = browser.event("q2a-look", "click")
    assert "no clip in this conversation" in shown["q2a-progress"] and shown["q2a-report"] == ""
    browser.event("q2a-upload", "upload", [browser.file("bell.flac", BELL.read_bytes())])
    browser.event("q2a-send", "click", "<b>What?</b>", *knobs(2))
    assert re.search(
        r'class="q2a-audio">audio 1: \d+</span>', browser.event(*inside())["q2a-inside"]
    )
    shown = browser.event("q2a-look", "click")
    report = shown["q2a-report"]
    assert shown["q2a-progress"] == "" and report.count("<") == 2  # a frame and nothing else
    assert report.startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html')


def test_a_look_inside_ends_when_nobody_waits(page, worker):
    with pytest.raises(InputError, match="no answer yet"):
        inspect(page)
    page.add(BELL)
    page.ask("What?", **SHORT)
    finish(page)
    hold = Hold(worker)
    look = inspect(page)
    assert look.job is not None and worker.place(look.job) == 1 and not page.busy
    page.ask("And now?", **SHORT)  # the conversation goes on
    hold.go.set()
    finish(page)
    assert look.job.done and look.job.error == look.page == ""
    seen = []

    class Stopping(Job):
        @property
        def stopped(self) -> bool:
            seen.append(look.stage)
            return len(seen) > 3

    look = inspect(page)
    look.job.__class__ = Stopping  # stop it when it has begun
    assert look.job.wait(60) and look.page == "" and seen[-1] != ""


def inside() -> tuple[str, str]:
    return "q2a-inside-tab", "select"


def test_an_example_and_a_recording_that_is_answered_at_once(served, model):
    browser = Browser(served)
    shown = browser.event(
        "q2a-chat",
        "example_select",
        *knobs(),
        event_data={"index": 3, "value": {"files": ["/etc/passwd"]}},
    )
    expected = model.ask("What is that sound?", CLIPS / "sound_siren.flac", **SHORT)
    assert shown["q2a-chat"][-1]["content"][0]["text"] == expected.text
    said = browser.file("audio.wav", wav_of(CLIPS / "en_capital.flac"))
    shown = browser.event("q2a-microphone", "stop_recording", said, True, "", *knobs())
    assert len(shown["q2a-chat"]) == 4 and "recording 1" in str(shown["q2a-chat"][2])


def wav_of(clip: Path) -> bytes:
    samples, rate = soundfile.read(clip)
    soundfile.write(file := io.BytesIO(), samples, rate, format="WAV")
    return file.getvalue()


def test_a_hundred_broken_uploads(served, model):
    """Each is answered with its message, and the process goes on."""
    browser = Browser(served)
    for number in range(100):
        name = f"broken-{number}.wav"
        shown = browser.event("q2a-upload", "upload", [browser.file(name, broken(number))])
        assert 'role="alert"' in shown["q2a-status"] and name in shown["q2a-status"]
        assert "Traceback" not in str(shown) and shown["q2a-waiting"] == ""
    shown = browser.event("q2a-send", "click", "Still there?", *knobs())
    assert shown["q2a-chat"][-1]["content"][0]["text"] == model.ask("Still there?", **SHORT).text


def test_uploads_that_are_too_large(served):
    status, body = Browser(served).upload("large.wav", bytes(2**20 + 1))
    assert status == 413 and b"size" in body
    status, body = Browser(served).upload("larger.wav", bytes(8 * 2**20 + 2**17))
    assert status == 413 and b"larger than 8 MB" in body  # eight files of a turn at once


@pytest.mark.parametrize(
    "path",
    [
        str(Path(__file__).resolve()),
        "pyproject.toml",
        "/etc/passwd",
        "{folder}/../../etc/passwd",
        "{folder}",
        "https://example.com/",
    ],
)
def test_files_that_are_nobodys_business(served, path):
    path = path.format(folder=os.environ["GRADIO_TEMP_DIR"])
    assert Browser(served).send("/gradio_api/file=" + path)[0] in (403, 404)


def test_an_event_that_names_a_url_fetches_nothing(served, monkeypatch):
    from gradio import processing_utils

    def fetched(*words):
        raise AssertionError(f"fetched {words}")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", fetched)
    url = {"path": "https://example.com/a.wav", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AssertionError, match="'success': False") as caught:
        Browser(served).event("q2a-upload", "upload", [url])
    assert "fetched" not in str(caught.value)


def test_a_port_that_is_taken_at_the_last_moment(model, monkeypatch):
    """Two that start at once find the same port free; the later one takes the next."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    free, found = server.free_port, []

    def late(host, port):
        found.append(free(host, port))
        if len(found) == 1:
            taken.bind((host, found[0]))
            taken.listen()
        return found[-1]

    monkeypatch.setattr(server, "free_port", late)
    with socket.socket() as taken, server.serving(model) as addresses:
        assert len(found) == 2 and found[1] != found[0]
        assert addresses[0].endswith(f":{found[1]}")
        assert Browser(addresses[0]).send("/")[0] == 200


def test_the_page_is_not_served_under_another_name(served):
    status, body = Browser(served).send("/", Host="evil.example")
    assert status == 403 and b"to this machine alone" in body


def test_a_file_that_was_not_uploaded(served):
    browser = Browser(served)
    data = {"path": str(BELL), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AssertionError, match="error"):
        browser.event("q2a-upload", "upload", [data])


def test_a_password(model):
    pytest.importorskip("gradio", reason="the page needs gradio")
    with server.serving(model, password="sesame ÿ") as (address,):
        browser = Browser(address)
        clip = str(BELL)
        for path in (
            "/config",
            "/gradio_api/file=" + clip,
            "/gradio_api/queue/data?session_hash=x",
        ):
            assert browser.send(path)[0] == 401, path
        assert browser.upload("x.wav", b"x")[0] == 401
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert browser.send("/login", b"username=a&password=wrong", **form)[0] == 400
        assert browser.send("/config")[0] == 401
        right = "username=a&password=" + urllib.request.quote("sesame ÿ")
        assert browser.send("/login", right.encode(), **form)[0] == 200
        assert browser.send("/config")[0] == 200
        shown = browser.event("q2a-send", "click", "Hello", *knobs())
        assert shown["q2a-chat"][-1]["content"][0]["text"] == model.ask("Hello", **SHORT).text


# --- The command


def run(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["qwen2audio", "demo", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert captured.out == ""
    return stop.value.code, captured.err


def test_mistakes_of_the_command(monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the page needs gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(monkeypatch, capsys, "--port", port) == (
            2,
            f"error: port {port} is taken: give another --port\n",
        )
    code, err = run(monkeypatch, capsys, "--password", "")
    assert code == 2 and "the password is empty" in err
    code, err = run(monkeypatch, capsys, "--model", "no/such/folder")
    assert code == 2 and "no such folder" in err
    assert run(monkeypatch, capsys, "--share", "maybe")[0] == 2


def test_an_upload_without_pyav_tells_nothing_of_our_folders(page, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.m4a").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(1000))
    with pytest.raises(AudioError) as told:
        page.add(tmp_path / "clip.m4a")
    assert str(told.value).endswith("webm and mp4 need PyAV, which this server does not have")


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, err = run(monkeypatch, capsys)
    assert (code, err) == (2, f"error: the page needs Gradio: {install.extra('web')}\n")


@pytest.mark.parametrize(
    "end", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_command_serves_until_it_is_told_to_end(end, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio")
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen2audio_core.cli", "demo"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "Ctrl-C" in line:
                break
        address = re.search(r"http://127\.0\.0\.1:\d+", said[-1] if said else "")
        assert address, said
        browser = Browser(address[0])
        browser.event("q2a-upload", "upload", [browser.file("bell.flac", BELL.read_bytes())])
        assert {"bell.flac", "clip-1.wav", "clip-1.png"} <= {Path(f).name for f in files(tmp_path)}
        process.send_signal(end)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "") and err.strip() == "closed"
    assert files(tmp_path) == []
