"""The command itself: its start, its documents, its end."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_server import live  # noqa: F401  skips these tests where the extra is missing
from typer.testing import CliRunner

from qwen2audio_core import cli, install
from qwen2audio_core.errors import InputError
from qwen2audio_core.serving import run as running

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "server.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.M | re.S)


class Process:
    """`qwen2audio serve` in a process of its own."""

    def __init__(self, words, cache):
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qwen2audio_core.cli", *words]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"answers at http://127\.0\.0\.1:(\d+)/v1", line):
                break
        assert found, "".join(self.lines)
        self.port = int(found[1])
        self._rest = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self._rest.start()

    def end(self, number=signal.SIGTERM):
        """Signal it; returns its exit code."""
        self.process.send_signal(number)
        return self.join()

    def join(self):
        code = self.process.wait(60)
        self._rest.join(10)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The document's own line, at a free port."""
    (line,) = [block for block in blocks("bash") if block.startswith("qwen2audio serve")]
    words = line.split()[1:]
    process = Process([*words, "--port", "0"], tmp_path_factory.mktemp("cache"))
    yield process
    if process.process.poll() is None:
        process.end()


def here(text, server):
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_the_curl_examples_run(server, tmp_path):
    for tool in ("curl", "base64", "bash"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs the program {tool}")
    (tmp_path / ".curlrc").write_text("fail\nsilent\nshow-error\n")
    examples = [block for block in blocks("bash") if "curl" in block]
    assert len(examples) == 3
    environment = os.environ | {"CURL_HOME": str(tmp_path), "HOME": str(tmp_path)}
    for example in examples:
        done = subprocess.run(
            ["bash", "-euc", here(example, server)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_python_examples_run(server, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = blocks("python")
    assert len(examples) == 2
    shown, names = io.StringIO(), {}
    with contextlib.redirect_stdout(shown):
        for example in examples:
            exec(example.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), names)
    names["client"].close()
    assert len(shown.getvalue().split()) > 3


def test_every_option_of_the_document_exists():
    import typer

    known = {
        option
        for parameter in typer.main.get_command(cli.app).commands["serve"].params
        for option in parameter.opts
    }
    named = set(re.findall(r"`(?:[^`]*\s)?(--[a-z0-9-]+)", DOCUMENT))
    others = {"--prompt", "--json"}  # of other commands
    assert len(named) > 20 and named - others <= known
    for option in known - {"--device", "--dtype", "--no-pack", "--port", "--access-log", "-m"}:
        assert option in DOCUMENT, f"{option} is not in docs/server.md"


def test_a_signal_lets_answers_end(server):
    """Last of those that use this process: it has ended then."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "max_tokens": 400,
        "min_tokens": 400,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.readline().startswith(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    lines = answer.read().decode().splitlines()
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-4][6:])["usage"]["completion_tokens"] == 400
    connection.close()
    assert server.join() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    assert not [line for line in server.lines if "Traceback" in line or "ERROR" in line]


# --- what can be wrong before it starts -----------------------------------------------------------


@pytest.fixture
def start(monkeypatch):
    """start(option, ...) -> (result, policy, engine options); no model, no server."""

    def call(*words):
        seen = []

        def serve(sock, assistant, policy, engine_options, **options):
            sock.close()
            seen.extend([policy, engine_options])

        monkeypatch.setattr(running, "serve", serve)
        monkeypatch.setattr("qwen2audio_core.terminal.load", lambda *options: None)
        result = CliRunner().invoke(cli.app, ["serve", "--port", "0", *words])
        return result, *(seen or (None, None))

    return call


def test_whom_it_trusts_by_default(start, tmp_path, monkeypatch):
    monkeypatch.delenv("QWEN2AUDIO_API_KEY", raising=False)
    result, policy, engine = start()
    assert result.exit_code == 0 and "warning" not in result.output
    assert policy.name == "tiny" and policy.api_key is None
    assert policy.hosts == {"localhost", "127.0.0.1", "::1"}
    assert policy.allow_files is None and not policy.allow_private_urls
    assert engine["max_batch"] == 8 and engine["max_tokens"] == 2048

    result, policy, _ = start("--host", "0.0.0.0")
    assert "everybody who reaches 0.0.0.0 can use this server" in result.output
    assert policy.hosts is None
    monkeypatch.setenv("QWEN2AUDIO_API_KEY", "sesame")
    result, policy, _ = start("--host", "0.0.0.0", "--model", str(tmp_path), "--max-body-mb", "1")
    assert "warning" not in result.output and policy.api_key == "sesame"
    assert start("--api-key", "key\n")[1].api_key == "key"  # as a file with a secret ends
    assert start()[1].origins == frozenset()
    found = start("--allow-origin", "https://A.test/", "--allow-origin", "http://b.test:80")[1]
    assert found.origins == {"https://a.test", "http://b.test:80"}
    monkeypatch.setenv("QWEN2AUDIO_API_KEY", "")
    assert "QWEN2AUDIO_API_KEY is empty" in str(start("--host", "0.0.0.0")[0].exception)
    monkeypatch.delenv("QWEN2AUDIO_API_KEY")
    assert policy.name == tmp_path.name and policy.body_bytes == 2**20
    assert start("--name", "mine")[1].name == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots", "0"], "--slots is 0"),
        (["--grace", "-1"], "--grace is -1"),
        (["--grace", "inf"], "--grace is inf"),
        (["--grace", "nan"], "--grace is nan"),
        (["--timeout", "nan"], "request_seconds is nan"),
        (["--prefix-mb", "-5"], "--prefix-mb is -5"),
        (["--context", "-1"], "--context is -1"),
        (["--context", "63"], "--context is 63, it must be a number of at least 64"),
        (["--max-clips", "0"], "clips is 0"),
        (["--allow-files", "/nowhere"], "/nowhere: not a folder"),
        (["--host", "no such host"], "cannot listen at no such host"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
        (["--api-key", " "], "the API key must be"),
    ],
)
def test_options_that_cannot_be(start, words, message):
    error = start(*words)[0].exception
    assert isinstance(error, InputError) and message in str(error) and "\n" not in str(error)


def test_a_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        error = start("--port", port)[0].exception
    assert isinstance(error, InputError) and "Address already in use" in str(error)


def test_ctrl_c_before_it_answers_is_no_clean_end(monkeypatch, capsys):
    def load(*options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("qwen2audio_core.terminal.load", load)
    monkeypatch.setattr(sys, "argv", ["qwen2audio", "serve", "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"
    assert "exit code 130 and 143" in DOCUMENT


@pytest.mark.parametrize("when", ["load", "warm"])
def test_sigterm_before_it_answers_ends_it(monkeypatch, when):
    """Also as the first process of a container, which SIGTERM alone does not end."""
    done = []

    def terminated(*options):
        signal.raise_signal(signal.SIGTERM)

    def load(*options):
        return terminated() if when == "load" else SimpleNamespace(model=None)

    monkeypatch.setattr("qwen2audio_core.terminal.load", load)
    engine = SimpleNamespace(warm=terminated, max_tokens=2048)
    monkeypatch.setattr(running, "Engine", lambda model, **options: engine)
    service = SimpleNamespace(close=lambda: done.append("closed"))
    monkeypatch.setattr(running, "Service", lambda *parts: service)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0"])
    assert result.exit_code == 143
    assert done == (["closed"] if when == "warm" else [])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_as_the_server_starts_is_not_lost(monkeypatch, capsys, number):
    seen = []

    class Server:
        def handle_exit(self, number, frame):
            seen.append(number)

        def run(self, sockets):
            signal.raise_signal(number)  # before uvicorn listens for it

    engine = SimpleNamespace(warm=lambda: seen.append("warm"), max_tokens=2048)
    monkeypatch.setattr(running, "Engine", lambda model, **options: engine)
    monkeypatch.setattr(running, "Service", lambda *parts: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(running, "make_server", lambda service, **options: Server())
    before = signal.getsignal(number)
    for context in (2048, 2049):
        assert capsys.readouterr().err == ""
        running.serve(None, SimpleNamespace(model=None), None, {"max_tokens": context})
        assert seen == ["warm", number] and signal.getsignal(number) is before
        seen.clear()
    assert "own context is 2,048 tokens, --context is lowered" in capsys.readouterr().err


def test_quantised_while_it_is_read(monkeypatch):
    given = []
    monkeypatch.setattr(running, "serve", lambda sock, *parts, **options: sock.close())
    monkeypatch.setattr("qwen2audio_core.terminal.load", lambda *options: given.append(options))
    words = ["serve", "--port", "0", "--quantize", "int4"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert given == [("tiny", None, None, False, "int4")]


def test_without_the_extra_it_says_what_to_install(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    error = start()[0].exception
    assert str(error) == f"the server needs prometheus_client: {install.extra('serve')}"
