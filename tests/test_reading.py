"""Reading parts of files in threads: every byte once, and what goes wrong comes out."""

import threading
from pathlib import Path

import pytest
import torch

from qwen2audio_core import reading
from qwen2audio_core.errors import CheckpointError
from qwen2audio_core.reading import Part

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path) -> Path:
    """10,000 numbers of 16 bits behind a head of 24 bytes."""
    path = tmp_path / "numbers"
    path.write_bytes(b"-" * 24 + torch.arange(10_000, dtype=torch.int16).numpy().tobytes())
    return path


@pytest.mark.parametrize("buffer_bytes", [1, 1000, 10**6])
@pytest.mark.parametrize("inference", [False, True])
def test_every_element_arrives_converted(file, buffer_bytes, inference):
    with torch.inference_mode(inference):
        whole = torch.full((100, 100), -1.0, dtype=torch.float64)
        first, second = whole[:37], whole[37:].view(torch.float64)
        parts = [Part(file, 24, torch.int16, first), Part(file, 24 + 7400, torch.int16, second)]
        reading.fill(parts, CPU, buffer_bytes)
        assert torch.equal(whole.flatten(), torch.arange(10_000.0, dtype=torch.float64))


def test_several_threads_share_the_work(file, monkeypatch):
    seen, read = set(), reading.read
    meet = threading.Barrier(reading.THREADS, timeout=20)

    def watched(*words):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            meet.wait()  # nobody goes on before all are here
        return read(*words)

    monkeypatch.setattr(reading, "read", watched)
    target = torch.empty(10_000, dtype=torch.int16)
    reading.fill([Part(file, 24, torch.int16, target)], CPU, 4096)
    assert len(seen) == reading.THREADS
    assert torch.equal(target, torch.arange(10_000, dtype=torch.int16))


def test_a_file_that_ends_too_early_or_is_not_there(file, tmp_path):
    target = torch.empty(10_001, dtype=torch.int16)
    for path, message in ((file, "ends too early"), (tmp_path / "gone", "cannot read it")):
        with pytest.raises(CheckpointError, match=message):
            reading.fill([Part(path, 24, torch.int16, target)], CPU, 4096)


def test_after_a_failure_nothing_more_is_read(file, monkeypatch):
    calls = []

    def broken(*words):
        calls.append(words)
        raise RuntimeError("no")

    monkeypatch.setattr(reading, "read", broken)
    with pytest.raises(RuntimeError, match="no"):
        reading.fill([Part(file, 24, torch.int16, torch.empty(10_000))], CPU, 64)
    assert len(calls) <= reading.THREADS


@pytest.mark.gpu
def test_a_gpu_is_fed(file, monkeypatch):
    monkeypatch.setattr(reading, "GPU_BUFFER_BYTES", 4096)
    target = torch.empty(10_000, device="cuda")
    reading.fill([Part(file, 24, torch.int16, target)], torch.device("cuda"), 1)
    assert torch.equal(target.cpu(), torch.arange(10_000.0))
