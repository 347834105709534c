"""The load test passes a server that keeps nothing, and catches one that does."""

import importlib.util
import json
import mmap
from contextlib import nullcontext
from pathlib import Path

import pytest
from live_server import NAME, live, small

from qwen2audio_core.serving.metrics import Metrics

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "load_test.py"
SIZES = {"clients": 4, "alone": 4, "tokens": 2, "seconds": 0.2, "warm": 40, "requests": 40}


@pytest.fixture(scope="module")
def load_test():
    spec = importlib.util.spec_from_file_location("load_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(small(tmp_path_factory.mktemp("cache")), {"prefix_bytes": 2**20}) as server:
        yield server


@pytest.fixture
def try_load(load_test, server, tmp_path):
    """try_load() -> (exit code, report)."""
    assert server.http.get("/health").status_code == 200

    def call():
        file = tmp_path / "report.json"
        words = [f"--{name}={value}" for name, value in SIZES.items()]
        code = load_test.main(["--url", server.url, "--model", NAME, "--json", str(file), *words])
        return code, json.loads(file.read_text())

    return call


def on_each_request(monkeypatch, act):
    request = Metrics.request

    def counted(self, endpoint, *parts):
        if endpoint != "/metrics":
            act()
        request(self, endpoint, *parts)

    monkeypatch.setattr(Metrics, "request", counted)


def test_a_server_that_keeps_nothing(try_load):
    code, report = try_load()
    assert report["errors"] == [] and report["leaks"] == [] and code == 0
    assert report["phases"]["requests"]["requests"] == 40
    assert {"clip", "stream", "text", "transcript", "broken"} <= set(
        report["phases"]["warm_up"]["kinds"]
    ) | set(report["phases"]["requests"]["kinds"])


def test_memory_kept_of_each_request(try_load, monkeypatch):
    kept = []

    def keep():  # pages of its own: bytes could find room among what malloc has and nobody uses
        kept.append(mmap.mmap(-1, 4 * 2**20))
        kept[-1].write(b"\1" * 4 * 2**20)

    on_each_request(monkeypatch, keep)
    try:
        code, report = try_load()
    finally:
        for pages in kept:
            pages.close()
    assert code == 1 and len(kept) > 80 and report["errors"] == []
    (leak,) = report["leaks"]
    assert leak.startswith("memory grew by")


def test_a_file_left_open(try_load, monkeypatch):
    kept = []
    on_each_request(monkeypatch, lambda: kept.append(SCRIPT.open()))
    try:
        code, report = try_load()
    finally:
        for file in kept:
            file.close()
    assert code == 1 and report["errors"] == []
    (leak,) = report["leaks"]
    assert leak.startswith("open files grew from")


@pytest.mark.parametrize("name", ["clients", "alone", "warm", "requests"])
def test_a_number_that_is_none_is_told_before_any_load(load_test, monkeypatch, capsys, name):
    monkeypatch.setattr(load_test, "started", lambda options: pytest.fail("a server was started"))
    with pytest.raises(SystemExit) as stop:
        load_test.main([f"--{name}=0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --{name} is 0: at least 1\n")


def test_a_server_of_its_own_is_driven_once(load_test, monkeypatch):
    driven = []
    report = {"errors": [], "leaks": []}
    monkeypatch.setattr(load_test, "started", lambda options: nullcontext("http://127.0.0.1:1"))
    monkeypatch.setattr(load_test, "run", lambda url, options: driven.append(url) or report)
    monkeypatch.setattr(load_test, "show", lambda report: None)
    assert load_test.main([]) == 0
    assert load_test.main(["--url", "http://127.0.0.1:2/"]) == 0
    assert driven == ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def test_what_is_busy_when_all_is_answered(load_test):
    calm = dict.fromkeys(
        [
            *(f"qwen2audio_{name}" for name in ("slots_busy", "queue", "open_requests")),
            *("qwen2audio_prefix_cache_bytes", "process_resident_memory_bytes"),
            "process_open_fds",
        ],
        0.0,
    )
    assert load_test.leaks(calm, calm, 24) == []
    assert load_test.leaks(calm, calm | {"qwen2audio_slots_busy": 2.0}, 24) == [
        "2 slots_busy at the end"
    ]
    grown = calm | {"process_resident_memory_bytes": 30.0 * 2**20}
    assert load_test.leaks(calm, grown, 24) == [
        "memory grew by 30.0 MiB, 0.0 of it the prefix cache"
    ]
    cached = grown | {"qwen2audio_prefix_cache_bytes": 10.0 * 2**20}
    assert load_test.leaks(calm, cached, 24) == []
