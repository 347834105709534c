"""Many clients at once against `qwen2audio serve`: errors, leaks, and what it gains over one.

python scripts/load_test.py                       starts a server of the tiny model, and ends it
python scripts/load_test.py --url http://127.0.0.1:8000 --model NAME

Every request is one of these, by its number: a clip and a question, whole or streamed; a text
alone; a transcription; and now and then a broken clip, which must be refused, and a caller who
leaves in the middle of a stream. No two clips are alike. Answers have a fixed number of tokens, so
that both phases do the same work:

one at a time   a single client, one request after the other
together        all clients, each with its next request as soon as the last one is answered

A leak is what is still there once all is answered: busy slots, waiting answers, open requests; open
files beyond those before; memory that grew by more than --leak-mb. Files and memory are looked at
after --warm requests, when the prefix cache is full and so is oneDNN's of shapes, and again after
--requests more of the same kind. Exit code 1: an error or a leak.
Nothing is sent to any other machine than this one.
"""

import argparse
import base64
import http.client
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KINDS = ("clip", "stream", "text", "clip", "transcript", "stream", "clip", "text")
RATE = 16000


@dataclass
class Phase:
    """What came of some requests."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # s to the first piece of a stream
    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.latencies)
        return {
            "requests": len(ordered),
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(len(ordered) / self.seconds, 2),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "latency_median": round(statistics.median(ordered), 4),
            "latency_p95": round(ordered[int(0.95 * (len(ordered) - 1))], 4),
            "latency_most": round(ordered[-1], 4),
            "first_token_median": round(statistics.median(self.first), 4) if self.first else None,
            "kinds": dict(self.kinds),
            "errors": len(self.errors),
        }


class Client:
    """One connection, one request at a time. Raises AssertionError where an answer is not right."""

    def __init__(self, url: str, model: str, tokens: int, seconds: float):
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        self._model, self._tokens, self._seconds = model, tokens, seconds

    def run(self, number: int, kind: str, phase: Phase) -> int:
        """Make a request; returns the tokens that were written."""
        text = {"type": "text", "text": f"Question {number}: what is it?"}
        if kind == "text":
            return self._chat([text])
        if kind == "transcript":
            return self._transcript(sound(number, self._seconds))
        if kind == "broken":
            self._broken(number)
            return 0
        clip = base64.b64encode(sound(number, self._seconds)).decode()
        content = [{"type": "input_audio", "input_audio": {"data": clip, "format": "wav"}}, text]
        if kind == "clip":
            return self._chat(content)
        return self._stream(content, phase, leave=kind == "leaves")

    def _chat(self, content: list[Any]) -> int:
        answer = self._json(self._post(self._body(content)))
        written: int = answer["usage"]["completion_tokens"]
        assert written == self._tokens, f"{written} tokens came, {self._tokens} were asked for"
        return written

    def _stream(self, content: list[Any], phase: Phase, leave: bool) -> int:
        began = time.perf_counter()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        if leave:
            options |= {"max_tokens": 500, "min_tokens": 500}
        answer = self._post(self._body(content) | options)
        assert answer.status == 200, f"{answer.status}: {answer.read().decode()}"
        written = done = 0
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                done = 1
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            if leave and chunk["choices"][0]["delta"].get("content"):
                self._connection.close()
                return 0
            if chunk["choices"] and "role" not in chunk["choices"][0]["delta"] and not written:
                phase.first.append(time.perf_counter() - began)
                written = -1
            if chunk.get("usage"):
                written = chunk["usage"]["completion_tokens"]
        assert done and written == self._tokens, f"{written} tokens came, done: {done}"
        return written

    def _transcript(self, file: bytes) -> int:
        mark = "a-mark-between-parts"
        fields = {"model": self._model, "response_format": "verbose_json"}
        parts = [
            f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        parts.append(
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        )
        body = "".join(parts).encode() + file + f"\r\n--{mark}--\r\n".encode()
        answer = self._json(
            self._post(body, "/v1/audio/transcriptions", f"multipart/form-data; boundary={mark}")
        )
        return sum(len(segment["tokens"]) for segment in answer["segments"])

    def _broken(self, number: int) -> None:
        content = base64.b64encode(random.Random(number).randbytes(2000)).decode()
        part = {"type": "input_audio", "input_audio": {"data": content, "format": "wav"}}
        answer = self._post(self._body([part]))
        body = json.loads(answer.read())
        assert (answer.status, body["error"]["code"]) == (400, "invalid_audio"), body

    def _body(self, content: list[Any]) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._tokens,
            "min_tokens": self._tokens,
            "temperature": 0,
        }

    def _post(
        self, body: Any, path: str = "/v1/chat/completions", kind: str = "application/json"
    ) -> http.client.HTTPResponse:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("POST", path, content, {"Content-Type": kind})
        return self._connection.getresponse()

    @staticmethod
    def _json(answer: http.client.HTTPResponse) -> Any:
        content = answer.read()
        assert answer.status == 200, f"{answer.status}: {content.decode()}"
        return json.loads(content)

    def close(self) -> None:
        self._connection.close()


def sound(number: int, seconds: float) -> bytes:
    """A wav of noise, another one for every number."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(1)
        writer.setframerate(RATE)
        writer.writeframes(random.Random(number).randbytes(int(seconds * RATE)))
    return file.getvalue()


def kind_of(number: int) -> str:
    if number % 50 == 49:
        return "broken"
    if number % 50 == 24:
        return "leaves"
    return KINDS[number % len(KINDS)]


def drive(
    url: str, options: argparse.Namespace, numbers: range, clients: int, plain: bool = False
) -> Phase:
    """Make the requests of these numbers with so many clients; `plain` leaves out the odd ones."""
    phase, waiting, lock = Phase(), iter(numbers), threading.Lock()

    def work() -> None:
        client = Client(url, options.model, options.tokens, options.seconds)
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                break
            kind = KINDS[number % len(KINDS)] if plain else kind_of(number)
            began = time.perf_counter()
            tokens = 0
            try:
                tokens = client.run(number, kind, phase)
            except (AssertionError, OSError, http.client.HTTPException, ValueError) as error:
                client.close()
                with lock:
                    phase.errors.append(f"{kind} {number}: {type(error).__name__}: {error}"[:500])
            with lock:
                phase.latencies.append(time.perf_counter() - began)
                phase.kinds[kind] += 1
                phase.tokens += tokens
        client.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    phase.seconds = time.perf_counter() - began
    return phase


def look(url: str) -> dict[str, float]:
    """What /metrics says, name -> value, labels left out."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def settled(url: str) -> dict[str, float]:
    """The same once nothing is busy, or after ten seconds as it is then."""
    for _ in range(100):
        seen = look(url)
        if not any(seen[f"qwen2audio_{name}"] for name in ("slots_busy", "queue", "open_requests")):
            break
        time.sleep(0.1)
    return seen


@contextmanager
def started(options: argparse.Namespace) -> Iterator[str]:
    """A server of its own, in another process."""
    command = [sys.executable, "-m", "qwen2audio_core.cli", "serve", "--port", "0"]
    command += ["--model", options.model, "--slots", str(options.slots)]
    command += ["--prefix-mb", str(options.prefix_mb), "--device", options.device]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            seen = []
            for line in process.stderr:
                seen.append(line)
                if " answers at http://" in line:
                    break
            else:
                sys.exit("error: the server did not start\n" + "".join(seen))
            rest = threading.Thread(target=lambda: sys.stderr.writelines(process.stderr or ()))
            rest.start()
            yield line.split(" answers at ")[1].split("/v1")[0]
        finally:
            process.terminate()
            code = process.wait(60)
        rest.join()
    if code != 0:
        sys.exit(f"error: the server ended with code {code}")


def run(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """All phases; the report."""
    first = drive(url, options, range(10_000_000, 10_000_000 + options.clients), options.clients)
    alone = drive(url, options, range(20_000_000, 20_000_000 + options.alone), 1, plain=True)
    plain = range(30_000_000, 30_000_000 + options.clients * 4)
    together = drive(url, options, plain, options.clients, plain=True)
    warm = drive(url, options, range(options.warm), options.clients)
    early = settled(url)
    numbers = range(options.warm, options.warm + options.requests)
    rest = drive(url, options, numbers, options.clients)
    late = settled(url)

    looks = {"before": early, "after": late}
    phases = {"one_at_a_time": alone, "together": together, "warm_up": warm, "requests": rest}
    errors = [line for phase in (first, *phases.values()) for line in phase.errors]
    summaries = {name: phase.summary() for name, phase in phases.items()}
    rates = [summaries[name]["tokens_per_second"] for name in ("one_at_a_time", "together")]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "model": options.model,
        "clients": options.clients,
        "requests": sum(len(phase.latencies) for phase in (first, *phases.values())),
        "phases": summaries,
        "gain": round(rates[1] / rates[0], 2),
        "memory_mib": {
            name: round(mib(seen, "process_resident_memory"), 1) for name, seen in looks.items()
        },
        "open_files": {name: int(seen["process_open_fds"]) for name, seen in looks.items()},
        "prefix_cache_mib": round(mib(late, "qwen2audio_prefix_cache"), 1),
        "prefix_cache_entries": int(late["qwen2audio_prefix_cache_entries"]),
        "leaks": leaks(early, late, options.leak_mb),
        "errors": errors,
    }


def leaks(early: dict[str, float], late: dict[str, float], most: float) -> list[str]:
    """What is there in `late` and was not in `early`, both of `settled`; of memory above `most`."""
    found = [
        f"{late[f'qwen2audio_{name}']:.0f} {name} at the end"
        for name in ("slots_busy", "queue", "open_requests")
        if late[f"qwen2audio_{name}"]
    ]
    memory, cache = (
        mib(late, name) - mib(early, name)
        for name in ("process_resident_memory", "qwen2audio_prefix_cache")
    )
    if memory - max(cache, 0) > most:
        found.append(f"memory grew by {memory:.1f} MiB, {max(cache, 0):.1f} of it the prefix cache")
    files = int(early["process_open_fds"]), int(late["process_open_fds"])
    if files[1] > files[0]:
        found.append(f"open files grew from {files[0]} to {files[1]}")
    return found


def mib(seen: dict[str, float], name: str) -> float:
    return seen[f"{name}_bytes"] / 2**20


def show(report: dict[str, Any]) -> None:
    print(f"{report['model']}, {report['clients']} clients, {report['machine']}\n")
    print("phase          requests     s   req/s  tokens/s  median s   95 % s  first token s")
    for name, one in report["phases"].items():
        first = one["first_token_median"]
        print(
            f"{name:14} {one['requests']:8} {one['seconds']:5.1f} {one['requests_per_second']:7.1f}"
            f" {one['tokens_per_second']:9.0f} {one['latency_median']:9.3f}"
            f" {one['latency_p95']:8.3f} {first if first is None else format(first, '14.3f')}"
        )
    memory, files = report["memory_mib"], report["open_files"]
    print(f"\ntogether against one at a time: {report['gain']:.2f} times the tokens per second")
    print(
        f"memory {memory['before']} MiB after the warm-up, {memory['after']} MiB at the end;"
        f" open files {files['before']} and {files['after']}; prefix cache"
        f" {report['prefix_cache_mib']} MiB in {report['prefix_cache_entries']} entries"
    )
    print(f"errors: {len(report['errors'])}; leaks: {len(report['leaks'])}")
    for line in [*report["errors"][:10], *report["leaks"]]:
        print("  " + line)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a server that runs already, on this machine")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu", help="of a server started here")
    parser.add_argument("--slots", type=int, default=16, help="of a server started here")
    parser.add_argument("--prefix-mb", type=int, default=16, help="of a server started here")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--warm", type=int, default=2000, help="requests before memory is looked at"
    )
    parser.add_argument("--requests", type=int, default=2000, help="that must not leak")
    parser.add_argument("--alone", type=int, default=64, help="requests of the first phase")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each clip")
    parser.add_argument("--leak-mb", type=float, default=24.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    options = parser.parse_args(argv)
    for name in ("clients", "alone", "warm", "requests"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: at least 1")
    if options.url is None:
        with started(options) as url:
            report = run(url, options)
    elif urlsplit(options.url).hostname not in LOOPBACK:
        parser.error("--url must be of this machine")
    else:
        report = run(options.url.rstrip("/"), options)
    show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["errors"] or report["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())
