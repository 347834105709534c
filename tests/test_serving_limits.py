"""What the server allows, to whom, how long; and that nothing a caller does brings it down."""

import gc
import http.server
import io
import json
import os
import socket
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

openai = pytest.importorskip("openai")
soundfile = pytest.importorskip("soundfile")

from live_server import CLIPS, NAME, linked, live, small, spoken, wait, wav  # noqa: E402

from qwen2audio_core.assistant import StopWriter  # noqa: E402
from qwen2audio_core.serving import run as running  # noqa: E402
from qwen2audio_core.serving import sources  # noqa: E402
from qwen2audio_core.serving.app import _in_a_header  # noqa: E402

TURN = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LONG = {"max_tokens": 900, "min_tokens": 900}


@pytest.fixture(scope="module")
def assistant(one_thread, tmp_path_factory):
    return small(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def server(assistant):
    with live(assistant, audio_seconds=40.0, clips=3, body_bytes=2**22) as running:
        yield running


@contextmanager
def slowly(server, seconds=0.02):
    """Every step of the engine takes a while."""
    slots = server.service.engine.slots
    step = slots.step
    slots.step = lambda count: time.sleep(seconds) or step(count)
    try:
        yield
    finally:
        slots.step = step


def idle(server):
    engine = server.service.engine
    return engine.active == engine.waiting == 0 == server.service.open


def refused(answer, status, message="", code=None):
    """An answer that is an error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"] and "\n" not in error["message"]
    if code is not None:
        assert error["code"] == code
    return error


def open_request(server, body=None, head=None):
    """A connection with a request on it; the caller closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = b"" if body is None else json.dumps(body).encode()
    head = head or HEAD + f"Content-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


# --- who may --------------------------------------------------------------------------------------


def test_the_api_key(assistant):
    with live(assistant, api_key="sesame") as server:
        assert server.chat().choices
        assert server.http.get("/metrics").status_code == 200
        for key in ("", "Bearer", "Bearer wrong", "sesame", "Bearer sesame2", "Bearer séame"):
            headers = {"Authorization": key.encode()}
            for method, path in (
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
            ):
                answer = server.http.request(method, path, headers=headers)
                error = refused(answer, 401, "API key", "invalid_api_key")
                assert error["type"] == "authentication_error"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert server.http.get("/health", headers=headers).status_code == 200
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_a_web_page_cannot_reach_a_private_server(assistant):
    """Neither by its own name made to point here, nor from its own origin."""
    with live(assistant, hosts=frozenset({"localhost", "127.0.0.1"})) as server:
        assert server.chat().choices
        port = server.url.rpartition(":")[2]
        for headers, allowed in (
            ({"Host": f"localhost:{port}"}, True),
            ({"Host": f"localhost:{port}", "Origin": "http://localhost:3000"}, True),
            ({"Host": f"evil.test:{port}"}, False),
            ({"Host": "127.0.0.1.evil.test"}, False),
            ({"Host": "[::1"}, False),
            ({"Origin": "https://evil.test"}, False),
            ({"Origin": "null"}, False),
        ):
            answer = server.http.get("/v1/models", headers=headers)
            if allowed:
                assert answer.status_code == 200
            else:
                refused(answer, 403, "answers to this machine alone", "forbidden_host")


def test_files_are_closed_and_open_as_the_policy_says(assistant, server):
    clip = CLIPS / "en_capital.flac"
    closed = server.post(
        TURN | {"messages": [{"role": "user", "content": [linked(clip.as_uri())]}]}
    )
    refused(closed, 400, "not a file in a folder that is allowed", "forbidden_file")
    with live(assistant, allow_files=CLIPS) as other:
        assert other.chat([linked(clip.as_uri())]).usage.prompt_tokens_details.audio_tokens > 0
        for url in ("file:///etc/passwd", f"{CLIPS.as_uri()}/../tiny.py", "file:", "file:///a%00b"):
            body = TURN | {"messages": [{"role": "user", "content": [linked(url)]}]}
            refused(other.post(body), 400, "not a file in a folder", "forbidden_file")


@pytest.fixture
def website():
    """A web server on this machine."""
    asked = []

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/a.wav" else 404)
            self.end_headers()
            if self.path == "/a.wav":
                self.wfile.write(wav(0.5))

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as pages:
        thread = threading.Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}", asked
        pages.shutdown()
        thread.join()


def test_urls_of_this_machine_and_its_networks(assistant, server, website):
    url, asked = website
    for one in (url + "/a.wav", "http://169.254.169.254/latest/meta-data", "http://[::1]:1/"):
        body = TURN | {"messages": [{"role": "user", "content": [linked(one)]}]}
        error = refused(server.post(body), 400, "its address is not a public one", "invalid_audio")
        assert error["param"] == "messages[0].content[0].audio_url"
    assert asked == []
    with live(assistant, allow_private_urls=True) as other:
        answer = other.chat([linked(url + "/a.wav"), linked(url + "/a.wav")])
        assert answer.usage.prompt_tokens_details.audio_tokens == 24
        assert asked == ["/a.wav", "/a.wav"]
        body = TURN | {"messages": [{"role": "user", "content": [linked(url + "/b")]}]}
        refused(other.post(body), 400, "the server answered 404", "invalid_audio")


# --- how much -------------------------------------------------------------------------------------


def test_bodies_that_are_too_large(server):
    big = b'{"model": "' + b"x" * 2**22 + b'"}'
    kind = {"Content-Type": "application/json"}
    refused(server.http.post("/v1/chat/completions", content=big, headers=kind), 413, "4,194,304")
    parts = (big[i : i + 2**20] for i in range(0, len(big), 2**20))  # no length in the head
    answer = server.http.post("/v1/chat/completions", content=parts, headers=kind)
    refused(answer, 413, "larger than", "too_large")
    answer = server.http.post(
        "/v1/audio/transcriptions", data={"model": NAME}, files={"file": ("a.wav", big)}
    )
    refused(answer, 413, "larger than", "too_large")
    wait(lambda: idle(server))
    assert server.service._held == 0


def test_a_server_without_pyav_tells_nothing_of_its_folders(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    clip = spoken(b"\0\0\0\x18ftypM4A " + bytes(1000))
    answer = server.post(TURN | {"messages": [{"role": "user", "content": [clip]}]})
    message = refused(answer, 400, code="invalid_audio")["message"]
    assert message.endswith("webm and mp4 need PyAV, which this server does not have"), message


def test_seconds_clips_and_tokens(server):
    def chat(*content, **fields):
        body = TURN | fields | {"messages": [{"role": "user", "content": list(content)}]}
        return server.post(body)

    refused(chat(spoken(wav(41.0))), 400, "longer than the 40 s allowed here", "invalid_audio")
    refused(chat(spoken(wav(30.0)), spoken(wav(11.0))), 400, "longer than the 10 s allowed here")
    refused(chat(*[spoken(wav(0.1))] * 4), 400, "4 clips, at most 3")
    packed = io.BytesIO()
    soundfile.write(packed, np.zeros(8000 * 3600, "<i2"), 8000, format="FLAC")
    assert len(packed.getvalue()) < 2**20  # an hour in little space
    refused(chat(spoken(packed.getvalue())), 400, "longer than the 40 s allowed here")
    answer = server.http.post(
        "/v1/audio/transcriptions",
        data={"model": NAME},
        files={"file": ("hour.flac", packed.getvalue())},
    )
    error = refused(answer, 400, "file: hour.flac: longer than the 40 s", "invalid_audio")
    assert error["param"] == "file"
    refused(server.post(TURN | {"max_tokens": 5000}), 400, "from 1 to 1,024")
    words = {"type": "text", "text": "x" * 3000}
    error = refused(chat(words), 400, "context holds 2,048 tokens", "context_length_exceeded")
    assert error["param"] == "messages"
    words = {"type": "text", "text": "x" * 1500}
    refused(chat(words, max_tokens=1000), 400, "and 1,000 for the answer: send less")
    words = {"type": "text", "text": "x" * 1950}
    fitting = chat(words, max_tokens=None, min_tokens=1024)  # as much as there is room for
    used = fitting.json()["usage"]
    assert used["total_tokens"] == 2048 and used["completion_tokens"] < 100
    assert fitting.json()["choices"][0]["finish_reason"] == "length"


def test_content_types_and_paths(server):
    answer = server.http.post("/v1/chat/completions", content=json.dumps(TURN))
    refused(answer, 415, "expected application/json")
    plain = {"Content-Type": "text/plain"}  # all that a foreign web page can send without asking
    answer = server.http.post("/v1/chat/completions", content=json.dumps(TURN), headers=plain)
    refused(answer, 415, "text/plain")
    refused(server.http.get("/v1/chat/completions"), 405)
    refused(server.http.get("/docs"), 404, "expected /health, /metrics")
    refused(server.http.post("/v1/completions", json=TURN), 404)
    assert server.metric('qwen2audio_requests_total{endpoint="other",status="404"}') >= 2


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "\ud800"},
        {"\ud800": 1},
        {"seed": "\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [linked("http://\ud800.test/")]}]},
        {"messages": [{"role": "user", "content": [linked("file:///\ud800")]}]},
        {"messages": [{"role": "user", "content": [spoken(b"") | {"type": "\ud800"}]}]},
    ],
)
def test_half_a_surrogate_pair_anywhere(server, fields):
    """Python's JSON takes it, and nothing can write it back."""
    content = json.dumps(TURN | fields)
    kind = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/chat/completions", content=content, headers=kind)
    refused(answer, 404 if "model" in fields else 400)


def test_more_open_requests_than_allowed(assistant):
    with live(assistant, open_requests=2) as server, slowly(server):
        held = [open_request(server, TURN | LONG) for _ in range(2)]
        wait(lambda: server.service.engine.active == 2)
        answer = server.post(TURN)
        error = refused(answer, 429, "2 requests are open already", "server_busy")
        assert error["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert server.http.get("/health").status_code == 200  # these are always answered
        with pytest.raises(openai.RateLimitError):
            server.chat()
        held.pop().close()
        wait(lambda: server.service.open == 1)
        assert server.chat().choices
        held.pop().close()
        wait(lambda: idle(server))


def test_memory_of_all_open_requests(assistant):
    with live(assistant, held_bytes=2**20) as server, slowly(server):
        body = TURN | LONG | {"messages": [{"role": "user", "content": [spoken(wav(5.0))]}]}
        size = len(json.dumps(body)) + 160_000 + 320_000  # the clip again as bytes and as samples
        held = open_request(server, body)
        wait(lambda: server.service.engine.active == 1)
        assert server.service._held == pytest.approx(size, rel=0.02)
        refused(server.post(body), 429, "fill the server's memory", "server_busy")
        assert server.chat().choices  # a small one has room
        held.close()
        wait(lambda: idle(server))
        assert server.service._held == 0
        assert server.post(body | {"max_tokens": 1, "min_tokens": 0}).status_code == 200


# --- how long -------------------------------------------------------------------------------------


def test_time_outs(assistant):
    with live(assistant, request_seconds=0.5, body_seconds=0.3) as server, slowly(server):
        began = time.monotonic()
        refused(server.post(TURN | LONG), 504, "no answer within 0.5 s", "timeout")
        with pytest.raises(openai.APIError, match="not finished in time"):
            list(server.chat(stream=True, max_tokens=900, extra_body={"min_tokens": 900}))
        head = HEAD + "Content-Length: 9\r\n\r\n{"
        slow = open_request(server, head=head)
        assert b"408 Request Timeout" in slow.recv(4096)
        slow.close()
        assert time.monotonic() - began < 10
        wait(lambda: idle(server))


def test_a_caller_who_leaves_frees_the_slot_at_once(server):
    """While it waits, while it is written, while it streams; and before it was queued."""
    engine = server.service.engine
    before = server.metric('qwen2audio_answers_total{finish_reason="cancelled"}')
    with slowly(server, 0.05):
        writing = [open_request(server, TURN | LONG | {"stream": i % 2 == 0}) for i in range(4)]
        wait(lambda: engine.active == 4)
        waiting = open_request(server, TURN | LONG | {"n": 2})
        wait(lambda: engine.waiting == 2)
        waiting.close()
        wait(lambda: engine.waiting == 0, 1.0)
        began = time.monotonic()
        for one in writing:
            one.close()
        wait(lambda: engine.active == 0, 2.0)
        assert time.monotonic() - began < 2.0  # and not 900 steps of 0.05 s
    wait(lambda: idle(server))
    assert server.metric('qwen2audio_answers_total{finish_reason="cancelled"}') == before + 6


def test_a_caller_who_leaves_while_a_clip_is_decoded(server, monkeypatch):
    decode, begun, go = sources.decode, threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go.wait(10)
        return decode(*arguments)

    monkeypatch.setattr(sources, "decode", slow)
    tokens = server.metric("qwen2audio_completion_tokens_total")
    body = TURN | LONG | {"messages": [{"role": "user", "content": [spoken(wav(0.5))]}]}
    caller = open_request(server, body)
    assert begun.wait(10)
    caller.close()
    wait(lambda: server.service.open == 0)
    go.set()
    monkeypatch.undo()
    assert server.chat(max_tokens=1).choices
    wait(lambda: idle(server))
    written = server.metric("qwen2audio_completion_tokens_total") - tokens
    assert written <= 3  # the one above, and what a step may have been ahead


def test_a_caller_who_leaves_a_body_half_sent(server):
    head = HEAD + "Content-Length: 100\r\n\r\n{"
    callers = [open_request(server, head=head) for _ in range(5)]
    wait(lambda: server.service.open == 5)
    for caller in callers:
        caller.close()
    wait(lambda: idle(server))
    assert server.chat().choices


# --- what goes wrong ------------------------------------------------------------------------------


def broken_clips():
    """A hundred files that hold nothing to hear."""
    good = wav(1.0)
    flac = (CLIPS / "en_capital.flac").read_bytes()
    draw = np.random.default_rng(0)
    for i in range(20):
        yield flac[: 50 + 300 * i]
        yield draw.bytes(1000 * i)
        spoiled = bytearray(good[:2000])
        spoiled[i % 4 : 44] = draw.bytes(44 - i % 4)
        yield bytes(spoiled)
        yield b"ID3" + draw.bytes(500) if i % 2 else b"OggS" + draw.bytes(500)
        yield (b"", b"hello", b"<html></html>", wav(0.01), good[:40], b"RIFF")[i % 6]


def test_a_hundred_broken_uploads(server):
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    threads = threading.active_count()
    clips = list(broken_clips())
    assert len(clips) == 100

    def send(pair):
        i, data = pair
        if i % 2:
            return server.http.post(
                "/v1/audio/transcriptions", data={"model": NAME}, files={"file": ("a.wav", data)}
            )
        return server.post(TURN | {"messages": [{"role": "user", "content": [spoken(data)]}]})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, enumerate(clips)))
    for answer in answers:
        refused(answer, 400, code="invalid_audio")
    assert server.chat([spoken(wav(0.5))]).usage.prompt_tokens_details.audio_tokens == 12
    wait(lambda: idle(server))
    assert server.service._held == 0
    assert threading.active_count() <= threads + 4
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 20  # both ends of 8 connections


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (RuntimeError("a secret"), 500, "internal_error"),
        (RuntimeError("out of memory"), 503, "out_of_memory"),
    ],
)
def test_a_fault_in_one_request_is_its_own(server, monkeypatch, fault, status, code):
    slots = server.service.engine.slots
    prefill = slots.prefill

    def fails(jobs):
        if any(job.settings.max_new_tokens == 13 for job in jobs):
            raise fault
        return prefill(jobs)

    monkeypatch.setattr(slots, "prefill", fails)
    answer = server.post(TURN | {"max_tokens": 13})
    refused(answer, status, code=code)
    assert "secret" not in answer.text
    with pytest.raises(openai.APIError) as caught:
        list(server.chat(stream=True, max_tokens=13))
    assert caught.value.code == code
    assert server.chat().choices
    wait(lambda: idle(server))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_ends_is_seen_by_everybody(assistant, monkeypatch):
    with live(assistant) as server:
        engine = server.service.engine
        assert server.chat().choices

        def broken():
            raise AssertionError("a mistake")

        monkeypatch.setattr(engine, "_next_group", broken)
        refused(server.post(TURN), 500, code="internal_error")
        refused(server.post(TURN), 503, "the engine has ended", "engine_ended")
        health = server.http.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "the engine has ended"
        assert server.metric("qwen2audio_up ") == 0


def test_the_end_finishes_what_runs_and_takes_nothing_new(assistant):
    with ThreadPoolExecutor(3) as pool, live(assistant) as server, slowly(server):
        fields = {"max_tokens": 60, "extra_body": {"min_tokens": 60}}
        whole = pool.submit(server.chat, **fields)
        stream = pool.submit(lambda: list(server.chat(stream=True, **fields)))
        wait(lambda: server.service.engine.active == 2)
        ending = threading.Thread(target=server.stop)
        ending.start()
        wait(lambda: refuses(server))
        assert not whole.done()
        assert whole.result(20).usage.completion_tokens == 60
        assert stream.result(20)[-1].choices[0].finish_reason == "length"
        ending.join(20)
        assert not ending.is_alive() and idle(server)


def refuses(server):
    host, port = server.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


def told_of_the_end(whole, stream):
    refused(whole, 503, "the server is shutting down", "shutting_down")
    last = stream.text.strip().splitlines()[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "shutting_down"


def test_the_end_does_not_wait_for_ever_and_says_so(assistant):
    with ThreadPoolExecutor(3) as pool, live(assistant, grace=0.5) as server, slowly(server, 0.05):
        whole = pool.submit(server.post, TURN | LONG)
        stream = pool.submit(server.post, TURN | LONG | {"stream": True})
        wait(lambda: server.service.engine.active == 2)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 4
        told_of_the_end(whole.result(), stream.result())
        assert whole.result().headers["Retry-After"]


def test_a_long_step_does_not_keep_callers_from_being_told(assistant, monkeypatch):
    monkeypatch.setattr(running, "LAST_WORDS", 1)
    with (
        ThreadPoolExecutor(3) as pool,
        live(assistant, engine={"max_batch": 2}, grace=0.5) as server,
        slowly(server, 4),
    ):
        whole = pool.submit(server.post, TURN | LONG)
        stream = pool.submit(server.post, TURN | LONG | {"stream": True})
        wait(lambda: server.service.engine.active == 2)
        waits = pool.submit(server.post, TURN)
        wait(lambda: server.service.open == 3)
        server.stop()
        told_of_the_end(whole.result(), stream.result())
        told_of_the_end(waits.result(), stream.result())


def test_who_does_not_take_his_answer_holds_up_no_end(assistant, monkeypatch):
    monkeypatch.setattr(running, "LAST_WORDS", 1)
    with live(assistant, grace=0.5) as server:
        sending = HEAD + "Content-Length: 100\r\n\r\n"  # and never does
        held = open_request(server, head=sending)
        wait(lambda: server.service.open == 1)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 4
        held.close()


# --- what nobody keeps ----------------------------------------------------------------------------


def test_a_request_that_fails_leaves_nothing_in_memory(server, monkeypatch):
    """Not even until the next collection of garbage, which few and large tensors do not hasten."""
    heard, waveform = [], sources.waveform

    def noted(*arguments):
        made = waveform(*arguments)
        heard.append(weakref.ref(made))
        return made

    monkeypatch.setattr(sources, "waveform", noted)
    broken = [spoken(wav(1)), spoken(b"RIFF but nothing else")]
    long = [spoken(wav(1)), {"type": "text", "text": "word " * 3000}]
    gc.collect()
    gc.disable()
    try:
        for content in (broken, long):
            body = TURN | {"messages": [{"role": "user", "content": content}]}
            for stream in (False, True):
                refused(server.post(body | {"stream": stream}), 400)
        files = {"file": ("a.wav", wav(1))}
        form = {"model": NAME, "prompt": "<|AUDIO|>"}
        refused(server.http.post("/v1/audio/transcriptions", data=form, files=files), 400)
        assert len(heard) == 5
        wait(lambda: not any(one() is not None for one in heard), 5)
    finally:
        gc.enable()


def test_a_long_stop_string_that_begins_everywhere(assistant):
    writer = StopWriter(assistant.tokenizer, "x" * 10**6 + "y")
    (token,) = assistant.tokenizer.encode("x")
    began = time.perf_counter()
    assert "".join(writer.push(token) for _ in range(300)) + writer.finish() == "x" * 300
    assert time.perf_counter() - began < 2


# --- for programs around it -----------------------------------------------------------------------


def test_text_that_cannot_fit_has_its_code(assistant, server, monkeypatch):
    def told(text, **more):
        body = TURN | {"messages": [{"role": "user", "content": text}]} | more
        return refused(server.post(body), 400, "the context holds 2,048", "context_length_exceeded")

    for words in (1000, 3000):  # that is, within the model's own context and beyond it
        assert told("hello world " * words)["param"] == "messages"
    monkeypatch.setattr("qwen2audio_core.serving.chat.encode", None)  # which is not asked
    size = server.service.most_text + 1
    assert f"{size:,} characters" in told("x" * size)["message"]
    parts = [{"type": "text", "text": "four"}] * 2
    monkeypatch.setattr(server.service, "most_text", 7)
    told(parts)
    monkeypatch.setattr(server.service, "most_text", 8)
    assert server.post(TURN | {"messages": [{"role": "user", "content": parts}]}).status_code == 500


def test_no_text_stops_the_server(server):
    """To put marks above and below letters in order takes Python the square of their number."""
    content = "\u0301\u0316" * (server.service.most_text // 2)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            server.post, TURN | {"messages": [{"role": "user", "content": content}]}
        )
        slowest = 0.0
        while not asked.done():
            began = time.monotonic()
            assert server.http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
        refused(asked.result(), 400, "the context holds", "context_length_exceeded")
    assert slowest < 5  # and 20 if Python did it


def test_a_window_takes_what_room_there_is(assistant):
    with live(assistant, engine={"max_tokens": 900}) as server:
        form = {"model": NAME, "language": "en", "response_format": "verbose_json"}
        files = {"file": ("long.wav", wav(29))}
        answer = server.http.post("/v1/audio/transcriptions", data=form, files=files).json()
        (segment,) = answer["segments"]
        assert segment["finish_reason"] in ("stop", "length") and len(segment["tokens"]) > 100
        assert ("notices" in answer) == (segment["finish_reason"] == "length")
    with live(assistant, engine={"max_tokens": 400}) as server:
        answer = server.http.post("/v1/audio/transcriptions", data=form, files=files)
        assert refused(answer, 400, code="context_length_exceeded")["param"] == "file"


def test_notices_in_a_header():
    assert _in_a_header([]) == ""
    assert _in_a_header(["a\nb", "ü 語"]) == "a b; ü ?"
    told = _in_a_header([f"notice {i:04}" for i in range(500)])
    assert len(told) < 1050 and told.startswith("notice 0000; notice 0001")
    kept = told.count("notice")
    assert told.endswith(f"; and {500 - kept} more") and kept > 70
    assert _in_a_header(["x" * 2000]) == "x" * 2000


def test_requests_have_names(server, caplog, monkeypatch):
    given = {"x-request-id": "mine-1"}
    assert server.http.get("/health", headers=given).headers["x-request-id"] == "mine-1"
    other = [server.http.get("/nowhere").headers["x-request-id"] for _ in range(2)]
    assert other[0].startswith("req_") and other[0] != other[1]
    for wrong in ("a b", "é", "x" * 101):
        found = server.http.get("/health", headers={"x-request-id": wrong.encode("latin-1")})
        assert found.headers["x-request-id"].startswith("req_")
    assert server.chat()._request_id.startswith("req_")
    monkeypatch.setattr("qwen2audio_core.serving.chat.encode", None)
    refused(server.post(TURN, headers=given), 500)
    assert "/v1/chat/completions failed, request mine-1" in caplog.text


def test_no_redirect_leads_past_a_proxys_prefix(server):
    refused(server.post(TURN, path="/v1/chat/completions/"), 404, "is not here")


def test_pages_that_are_allowed_to_call(assistant):
    page = {"Origin": "https://page.test"}
    asking = page | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    options = {"api_key": "sesame", "origins": frozenset({page["Origin"]})}
    with live(assistant, **options) as server:
        asking["Access-Control-Request-Private-Network"] = "true"
        allowed = server.http.options("/v1/chat/completions", headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["Access-Control-Allow-Origin"] == page["Origin"]
        assert "authorization" in allowed.headers["Access-Control-Allow-Headers"]
        answer = server.post(TURN, headers=page)
        assert answer.headers["Access-Control-Allow-Origin"] == page["Origin"]
        wrong = server.post(TURN, headers=page | {"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401 and "Access-Control-Allow-Origin" in wrong.headers
        other = server.post(TURN, headers={"Origin": "https://other.test"})
        assert "Access-Control-Allow-Origin" not in other.headers
    names = frozenset({"localhost", "127.0.0.1"})
    with live(assistant, hosts=names, origins=frozenset({page["Origin"]})) as server:
        assert server.post(TURN, headers=page).status_code == 200
        refused(server.post(TURN, headers={"Origin": "https://other.test"}), 403)
        refused(server.post(TURN, headers=page | {"Host": "evil.test"}), 403)
    with live(assistant, hosts=names, origins=frozenset({"*"})) as server:
        assert server.post(TURN, headers=page).headers["Access-Control-Allow-Origin"] == "*"


def test_streams_are_counted_as_they_ended(assistant):
    line = 'qwen2audio_requests_total{endpoint="/v1/chat/completions",status="%d"}'
    with live(assistant, request_seconds=1.0) as server, slowly(server):
        body = TURN | LONG | {"stream": True}
        typical = server.service._typical
        assert '"code": "timeout"' in server.post(body).text
        wait(lambda: server.metric(line % 504) == 1)
        held = open_request(server, body)
        wait(lambda: server.service.engine.active == 1)
        held.recv(100)
        held.close()
        wait(lambda: server.metric(line % 499) == 1)
        assert server.metric(line % 200) == 0 and server.service._typical == typical
        assert "[DONE]" in server.post(TURN | {"stream": True}).text
        wait(lambda: server.metric(line % 200) == 1)
