"""Everything that can carry sound into the program, and everything that must not get in."""

import base64
import contextlib
import http.server
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2audio_core import audio, audio_files, install
from qwen2audio_core.errors import AudioError
from qwen2audio_core.frontend import MAX_SAMPLES, clip_lengths

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "qwen2audio_core" / "assets" / "clips"

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def encode(samples: np.ndarray, rate: int = 16_000, **kwargs: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", "subtype": "FLOAT", **kwargs})
    return file.getvalue()


def refused(source: object, match: str, **kwargs: object) -> None:
    with pytest.raises(AudioError, match=match) as caught:
        audio.load(source, **kwargs)
    assert len(str(caught.value).splitlines()) == 1


# --- Real files


# file: seconds; from the README beside them, or measured with ffprobe's stream duration
SHARED = {
    "1272-128104-0000.flac": 5.855,
    "de_thorsten_angry.wav": 1.98,
    "es_whisperkit.wav": 7.664,
    "glass-breaking-151256.mp3": 4.032,
    "humpback_64s.ogg": 64.809,
    "jfk.mp3": 11.0,
    "jfk.wav": 11.0,
    "jfk_stereo_44k.flac": 11.0,
    "jfk_44k.m4a": 11.005,
    "eight_channels.m4a": 8.064,
    "test_audio_48000.opus": 1.0,
    "zh_aishell_BAC009S0724W0121.wav": 4.281,
}


@pytest.mark.parametrize("file", SHARED)
def test_reads_every_format(shared: Path, file: str) -> None:
    if file.endswith("m4a"):
        pytest.importorskip("av")
    waveform = audio.load(shared / "audio" / file)
    assert waveform.dtype == torch.float32
    assert waveform.ndim == 1
    # From PyAV 19 on, FFmpeg leaves out what fills up the last frame of aac, of 1024 samples.
    filling = (
        1024 / 44_100 if file.endswith("m4a") and int(version("av").split(".")[0]) >= 19 else 0
    )
    seconds = len(waveform) / 16_000
    assert SHARED[file] - filling - 1e-3 <= seconds <= SHARED[file] + 1e-3
    assert 0.01 < waveform.abs().max() <= 1.1


def test_the_same_speech_in_every_format(shared: Path) -> None:
    """One recording in four encodings: the channels, the offset and the scale all agree."""
    pytest.importorskip("av")
    original = audio.load(shared / "audio" / "jfk.wav")
    for file in ("jfk.mp3", "jfk_stereo_44k.flac", "jfk_44k.m4a"):
        other = audio.load(shared / "audio" / file)[: len(original)]
        spectra = torch.fft.rfft(torch.stack((original, other)), 2 * len(original))
        correlation = torch.fft.irfft(spectra[0].conj() * spectra[1])
        # Within 3 ms, as no two encoders delay alike; the same sign; nearly the same energy.
        lag = int(correlation.argmax())
        lag -= len(correlation) * (lag > len(original))
        similarity = correlation.max() / (original.norm() * other.norm())
        assert abs(lag) <= 48, file
        assert similarity > 0.98, file
        assert 0.9 < other.norm() / original.norm() < 1.1, file


def test_glass_clip_has_101_tokens(shared: Path) -> None:
    waveform = audio.load(shared / "audio" / "glass-breaking-151256.mp3")
    assert clip_lengths(len(waveform)).audio_tokens == 101


def test_bit_identical_with_librosa(shared: Path) -> None:
    librosa = pytest.importorskip("librosa")
    files = [p for p in sorted((shared / "audio").iterdir()) if p.suffix not in (".m4a", ".md")]
    assert len(files) >= 16
    for path in files:
        expected, _ = librosa.load(path, sr=16_000)
        assert np.array_equal(audio.load(path).numpy(), expected), path.name


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192000, 44099])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_bit_identical_with_librosa_by_rate(rate: int, channels: int, tmp_path: Path) -> None:
    librosa = pytest.importorskip("librosa")
    path = tmp_path / "clip.wav"
    path.write_bytes(encode(noise(rate // 2 + 7, channels), rate))
    expected, _ = librosa.load(path, sr=16_000)
    assert np.array_equal(audio.load(path).numpy(), expected)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(100_003, 2), 44_100)
    whole = audio.load(data)
    monkeypatch.setattr(audio_files, "BLOCK_SAMPLES", 2 * 977)
    assert torch.equal(audio.load(data), whole)
    monkeypatch.setattr(audio, "BLOCK_SAMPLES", 2 * 977)
    samples = noise(100_003, 2)
    assert torch.equal(audio.load(samples, sampling_rate=44_100), whole)


# --- Kinds of source


def test_path_bytes_file_object_and_urls_agree(tmp_path: Path) -> None:
    data = encode(noise(4000))
    path = tmp_path / "a clip 声.wav"
    path.write_bytes(data)
    expected = audio.load(path)
    body = base64.b64encode(data).decode()
    sources = [
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        path.as_uri(),
        f"data:audio/wav;base64,{body}",
        f"DATA:audio/wav;BASE64,{body.rstrip('=')}",
        "data:;base64," + body.replace("+", "%2B").replace("/", "%2F"),
        "data:audio/wav," + "".join(f"%{byte:02x}" for byte in data),
    ]
    for source in sources:
        assert torch.equal(audio.load(source), expected)
    with open(path, "rb") as file:
        assert torch.equal(audio.load(file), expected)
        assert not file.closed
    with open(path, "rb") as file:  # from where it stands
        assert file.read(4) == b"RIFF"
        refused(file, "not a wav")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipe(tmp_path: Path) -> None:
    data, pipe = encode(noise(4000)), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert torch.equal(audio.load(pipe), audio.load(data))
    writer.join()


def test_arrays_keep_their_samples() -> None:
    samples = noise(1000)
    expected = torch.from_numpy(samples)
    sources = [
        samples,
        samples.astype(np.float64),
        samples.astype(">f4"),
        samples[::-1][::-1],
        samples.tolist(),
        tuple(samples.tolist()),
        torch.from_numpy(samples),
        torch.from_numpy(samples).double(),
    ]
    for source in sources:
        for resampler in ("soxr", "torchaudio"):
            waveform = audio.load(source, sampling_rate=16_000, resampler=resampler)
            assert waveform.dtype == torch.float32
            assert torch.equal(waveform, expected)
    half = audio.load(torch.from_numpy(samples).bfloat16(), sampling_rate=16_000)
    assert torch.equal(half, expected.bfloat16().float())


def test_the_waveform_is_no_view_of_the_array() -> None:
    samples = noise(1000)
    waveform = audio.load(samples, sampling_rate=16_000)
    samples[:] = 0
    assert waveform.abs().max() > 0


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_integers_are_scaled_by_their_range(dtype: str) -> None:
    limits = np.iinfo(dtype)
    middle = 0 if dtype.startswith("i") else 2 ** (limits.bits - 1)
    quarter = middle + 2 ** (limits.bits - 3)
    samples = np.array([limits.min, middle, quarter, limits.max], dtype)
    top = np.float32(1 - 2.0 ** (1 - limits.bits))
    for source in (samples, torch.from_numpy(samples)):
        for resampler in ("soxr", "torchaudio"):
            waveform = audio.load(source, sampling_rate=16_000, resampler=resampler)
            assert waveform.tolist() == [-1.0, 0.0, 0.25, top]


def test_int16_array_equals_its_wav_file() -> None:
    samples = (noise(5000) * 2**15).astype(np.int16)
    from_file = audio.load(encode(samples, subtype="PCM_16"))
    assert torch.equal(audio.load(samples, sampling_rate=16_000), from_file)


@pytest.mark.parametrize("channels", [1, 2, 8, 64])
@pytest.mark.parametrize("tensor", [False, True])
def test_two_axes_are_one_clip(channels: int, tensor: bool) -> None:
    samples = noise(channels, 1000)
    expected = torch.from_numpy(samples.mean(axis=0))
    for array in (samples, samples.T):
        source = torch.from_numpy(array) if tensor else array
        for resampler in ("soxr", "torchaudio") if tensor else ("soxr",):
            waveform = audio.load(source, sampling_rate=16_000, resampler=resampler)
            # A sum of C terms may be taken in any order: at most C roundings of the largest sum.
            floor = channels * 2**-24 * float(np.abs(samples).max())
            assert torch.allclose(waveform, expected, rtol=0, atol=floor)


@pytest.mark.parametrize(
    "shape", [(), (2, 2), (65, 1000), (1000, 65), (1, 2, 1000), (300, 300), (0, 2, 3)]
)
def test_shapes_that_are_not_one_clip(shape: tuple[int, ...]) -> None:
    for source in (np.zeros(shape, np.float32), torch.zeros(shape)):
        for resampler in ("soxr", "torchaudio"):
            refused(source, "is not one clip", sampling_rate=16_000, resampler=resampler)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
def test_arrays_without_samples(shape: tuple[int, ...]) -> None:
    for source in (np.zeros(shape, np.float32), torch.zeros(shape)):
        for resampler in ("soxr", "torchaudio"):
            refused(source, "holds no samples", sampling_rate=16_000, resampler=resampler)
    refused([], "holds no samples", sampling_rate=16_000)


def test_arrays_that_are_not_sound() -> None:
    refused(noise(1000), "pass sampling_rate")
    for rate in (0, -16_000, 16_000.5, "16000", True, 999, 2_000_000, float("nan")):
        refused(noise(1000), "sampling_rate is", sampling_rate=rate)
    for dtype in (np.int64, np.uint64, bool, complex, object, "U4"):
        refused(np.zeros(1000).astype(dtype), "samples are", sampling_rate=16_000)
    refused([1, 2, 3], "samples are int64", sampling_rate=16_000)
    refused([[1.0, 2.0], [3.0]], "not numbers of one shape", sampling_rate=16_000)
    refused(torch.ones(1000, requires_grad=True), "has a gradient", sampling_rate=16_000)


def test_arguments_that_make_no_sense() -> None:
    refused(encode(noise(1000)), "leave it out", sampling_rate=16_000)
    refused(encode(noise(1000)), "resampler is 'sinc'", resampler="sinc")
    refused(7, "audio is a int")
    refused(None, "audio is a NoneType")
    refused(io.StringIO("RIFF"), "opened as 'rb'")


# --- Bad and unusual files


def test_no_such_file_and_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none.wav", r"none.wav: cannot open it: No such file")
    refused(tmp_path, "cannot open it: Is a directory")
    refused("a\0b.wav", "cannot open it")
    refused("x" * 5000, "cannot open it")
    refused("two\nlines.wav", "No such file")
    refused("ftp://host/a.wav", "only http, https, data and file URLs")


def test_empty_and_text_files(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.wav", tmp_path / "text.wav"
    empty.touch()
    text.write_text("this is not audio\n" * 100)
    refused(empty, r"empty.wav: is empty \(0 bytes\)")
    refused(text, "text.wav: not a wav, flac, mp3, ogg, opus or aiff file")
    refused(text.rename(tmp_path / "text.raw"), "raw samples do not say their rate")
    refused(encode(noise(0)), "holds no samples")


def test_playlists_do_not_reach_other_files(tmp_path: Path) -> None:
    pytest.importorskip("av")
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(noise(16_000), subtype="PCM_16"))
    playlists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile {secret}\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=audio 9 RTP/AVP 0\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        refused(tmp_path / name, "not a wav")


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.99])
def test_truncated_flac(subtype: str, part: float) -> None:
    data = encode(noise(100_000), format="FLAC", subtype=subtype)
    assert len(audio.load(data)) == 100_000
    refused(data[: int(part * len(data))], "broken or cut short")


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "MP3", "OGG", "OPUS"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_files_are_never_shorter_clips(kind: str, part: float) -> None:
    format_, subtype = {
        "MP3": ("MP3", "MPEG_LAYER_III"),
        "OGG": ("OGG", "VORBIS"),
        "OPUS": ("OGG", "OPUS"),
    }.get(kind, (kind, "PCM_16"))
    data = encode(noise(48_000), format=format_, subtype=subtype)
    assert len(audio.load(data)) == 48_000
    refused(data[: int(part * len(data))], "cut short")


@pytest.mark.parametrize("file", ["jfk_44k.m4a", "eight_channels.m4a"])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.99])
def test_truncated_m4a(shared: Path, file: str, part: float) -> None:
    pytest.importorskip("av")
    data = (shared / "audio" / file).read_bytes()
    refused(data[: int(part * len(data))], "cut short|not a wav")


def test_corrupt_mp3(shared: Path) -> None:
    for file in ("glass-breaking-151256.mp3", "jfk.mp3"):
        data = bytearray((shared / "audio" / file).read_bytes())
        data[30_000:40_000] = bytes(10_000)
        refused(bytes(data), "broken or cut short")


def stripped_mp3(samples: np.ndarray) -> bytes:
    """An mp3 of variable bit rate without its first frame, where the length stands."""
    kind = {"format": "MP3", "subtype": "MPEG_LAYER_III"}
    data = encode(samples, **kind, bitrate_mode="VARIABLE", compression_level=0.5)
    assert b"Xing" in data[:100]
    return data[data.index(b"\xff\xf3", 4) :]


def test_mp3_without_a_length_is_read_whole() -> None:
    """libsndfile alone would guess the length from the first frame and stop at a fifth of it."""
    pytest.importorskip("av")
    loud, silent = noise(160_000), np.zeros(480_000, np.float32)
    data = stripped_mp3(np.concatenate((loud, silent, loud[:16_000])))
    assert soundfile.info(io.BytesIO(data)).frames < 200_000
    # Whole frames of 576 samples, with the encoder's delay that only the missing frame states.
    assert 656_000 <= len(audio.load(data)) < 656_000 + 4 * 1152
    tagged = b"ID3\x04\0\0\0\0\x02\x01" + bytes(257) + data
    assert torch.equal(audio.load(tagged), audio.load(data))


def test_flac_without_a_length_is_read_whole() -> None:
    pytest.importorskip("av")
    data = bytearray(encode(noise(50_000), format="FLAC", subtype="PCM_16"))
    expected = audio.load(bytes(data))
    data[21] &= 0xF0  # 36 bits in the STREAMINFO block
    data[22:26] = bytes(4)
    assert torch.equal(audio.load(bytes(data)), expected)


MP3 = {"format": "MP3", "subtype": "MPEG_LAYER_III"}
ID3 = b"ID3\x04\0\0\0\0\x02\x01" + bytes(257)
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + struct.pack("<4I", 2000, 32 + 7, 1, 0xA0000000) + bytes(8 + 39)


@pytest.mark.parametrize(
    ("kind", "tag"),
    [
        ({"format": "OGG", "subtype": "VORBIS"}, b""),
        ({"format": "OGG", "subtype": "OPUS"}, b""),
        ({"format": "FLAC", "subtype": "PCM_16"}, b""),
        ({"format": "FLAC", "subtype": "PCM_24"}, ID3),
        (MP3, ID3),
        (MP3, ID3V1),
        (MP3, ID3V1 + ID3),
        (MP3, APE),
        (MP3, APE + ID3V1),
    ],
    ids=["vorbis", "opus", "flac", "flac, ID3v2", "ID3v2", "ID3v1", "both", "APE", "APE, ID3v1"],
)
def test_recordings_one_behind_the_other_are_all_heard(kind: dict[str, str], tag: bytes) -> None:
    """libsndfile reads the first and stops. `cat` makes such files, and radio streams are."""
    parts = [encode(noise(count, seed=count), **kind) for count in (32_000, 48_000, 16_000)]
    expected = torch.cat([audio.load(part) for part in parts])
    assert len(expected) == 96_000
    assert torch.equal(audio.load(tag.join(parts)), expected)
    assert torch.equal(audio.load(tag.join((*parts, b""))), expected)  # a tag at the end is none
    refused(tag.join(parts)[:-800], "broken or cut short|cut short")


@pytest.mark.parametrize("tag", [ID3, ID3 + ID3, ID3[:6] + b"\0\0\x46\0" + bytes(70 << 7)])
@pytest.mark.parametrize("kind", [{"format": "FLAC", "subtype": "PCM_16"}, MP3])
def test_tags_before_the_first_recording(kind: dict[str, str], tag: bytes) -> None:
    data = encode(noise(32_000), **kind)
    if kind is MP3 or tag != ID3 + ID3:  # libsndfile skips one before a flac
        assert torch.equal(audio.load(tag + data), audio.load(data))
    if kind is MP3:
        assert torch.equal(audio.load(ID3 + tag + data), audio.load(data))


@pytest.mark.parametrize(
    ("kind", "between"),
    [
        (MP3, b"LYRICSBEGIN" + bytes(500) + b"000511LYRICS200"),
        (MP3, bytes(100_000)),
        ({"format": "OGG", "subtype": "OPUS"}, bytes(3)),
        ({"format": "OGG", "subtype": "VORBIS"}, bytes(2**20)),
    ],
    ids=["lyrics", "zeros", "opus", "vorbis"],
)
def test_what_belongs_to_no_recording_hides_none(kind: dict[str, str], between: bytes) -> None:
    one, two = (encode(noise(32_000, seed=seed), **kind) for seed in range(2))
    refused(
        one + between + two,
        f"broken or cut short: byte {len(one)} and what follows are no (mp3|ogg)",
    )
    if kind is MP3:  # nothing behind them: as players take it
        assert torch.equal(audio.load(one + between), audio.load(one))


def test_a_tag_may_end_in_a_footer() -> None:
    tag = ID3[:5] + b"\x10" + ID3[6:] + b"3DI" + bytes(7)
    one, two = (encode(noise(32_000, seed=seed), **MP3) for seed in range(2))
    expected = torch.cat([audio.load(one), audio.load(two)])
    assert torch.equal(audio.load(one + tag + two), expected)


def test_recordings_one_behind_the_other_have_one_rate() -> None:
    kind = {"format": "FLAC", "subtype": "PCM_16"}
    both = encode(noise(16_000), **kind) + encode(noise(16_000), 48_000, **kind)
    refused(both, "its rate changes from 16000 to 48000 Hz midway")


def test_mixed_ogg_streams_are_no_second_recording() -> None:
    """Sound beside pictures: both begin before any other page."""
    data = encode(noise(32_000), format="OGG", subtype="VORBIS")
    first = 27 + data[26] + sum(data[27 : 27 + data[26]])
    other = bytearray(data[:first])
    other[14:18] = b"else"
    assert audio_files._ogg_streams(io.BytesIO(bytes(other) + data))[0] == [0]
    assert audio_files._ogg_streams(io.BytesIO(data + data))[0] == [0, len(data)]


def test_of_several_tracks_none_is_left_out_in_silence() -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        streams = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        for i, stream in enumerate(streams):
            samples = (noise(1, 4096, seed=i) * 2**15).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
    refused(file.getvalue(), "has 2 sound tracks, and which is meant is not said")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 8000 + 44])
def test_wav_of_a_pipe_or_a_sloppy_writer(size: int) -> None:
    data = bytearray(encode(noise(4000), subtype="PCM_16"))
    expected = audio.load(bytes(data))
    at = data.index(b"data") + 4
    assert struct.unpack("<I", data[at : at + 4]) == (8000,)
    data[at : at + 4] = struct.pack("<I", size)
    assert torch.equal(audio.load(bytes(data)), expected)


def test_without_pyav_the_message_says_what_to_install(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    path = shared / "audio" / "jfk_44k.m4a"
    refused(path, "jfk_44k.m4a: .*" + re.escape(install.extra("av")))


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_without_a_library_the_message_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refused(encode(noise(4000), 8000), re.escape(install.package(missing)))


def av_encode(format_: str, codec: str, samples: np.ndarray, rate: int = 48_000) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=format_) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        resampler = av.AudioResampler(
            stream.format, stream.layout, rate, frame_size=stream.codec_context.frame_size
        )
        frame = av.AudioFrame.from_ndarray(samples.T.copy(), format="fltp", layout="stereo")
        frame.sample_rate = rate
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("format_", "codec"),
    [("webm", "libopus"), ("mp4", "aac"), ("adts", "aac"), ("mov", "pcm_s24le")],
)
def test_other_containers(format_: str, codec: str) -> None:
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(96_000) / 48_000)
    data = av_encode(format_, codec, np.stack((tone, tone), axis=1).astype(np.float32))
    waveform = audio.load(data)
    # Codecs pad to whole frames, of at most 1024 samples, and adts cannot mark one of priming.
    assert 0 <= len(waveform) / 16_000 - 2.0 <= 2 * 1024 / 48_000
    spectrum = torch.fft.rfft(waveform[8000:24_000]).abs()
    assert spectrum.argmax() == 440
    assert waveform[8000:24_000].square().mean().sqrt() == pytest.approx(0.3 / 2**0.5, rel=0.02)
    if format_ != "mov":  # its index stands at the end
        refused(data[: len(data) * 2 // 3], "cut short|not a wav")


def test_a_title_that_is_not_utf8() -> None:
    data = av_encode("mp4", "aac", noise(4000, 2))
    assert b"Lavf" in data  # who wrote the file stands among its titles
    latin = data.replace(b"Lavf", b"\xe9\xff\xfe\xe8")
    assert torch.equal(audio.load(latin), audio.load(data))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_numbers(value: float) -> None:
    samples = noise(40_000, 2)
    huge = samples.astype(np.float64) * 1e300
    samples[20_000, 1] = samples[30_000, 0] = value
    refused(encode(samples), "the sample at 1.250 s is NaN")
    refused(encode(samples, 8000), "the sample at 2.500 s is NaN")
    refused(samples, "the sample at 1.250 s is NaN", sampling_rate=16_000)
    for resampler in ("soxr", "torchaudio"):
        tensor = torch.from_numpy(samples)
        refused(tensor, "at 1.250 s is NaN", sampling_rate=16_000, resampler=resampler)
    refused(huge, "at 0.000 s is NaN", sampling_rate=16_000)


def test_silence_eight_channels_and_192_khz() -> None:
    silence = audio.load(encode(np.zeros(16_000), subtype="PCM_16"))
    assert torch.equal(silence, torch.zeros(16_000))
    assert len(audio.split(silence)) == 1
    samples = noise(16_000, 8)
    assert torch.equal(audio.load(encode(samples)), torch.from_numpy(samples.mean(axis=1)))
    tone = np.sin(2 * np.pi * 1000 * np.arange(192_000) / 192_000)
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000).double() / 16_000)
    waveform = audio.load(encode(tone, 192_000))
    # soxr HQ is specified to 20 bits; the ends ring where the tone starts and stops at once.
    assert (waveform - expected)[500:-500].abs().max() < 2**-19


def test_more_than_twelve_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_files, "MAX_HOURS", 1 / 3600)
    refused(encode(noise(16_001)), "longer than")
    refused(noise(16_001), "longer than", sampling_rate=16_000)
    refused(torch.zeros(16_001), "longer", sampling_rate=16_000, resampler="torchaudio")
    assert len(audio.load(encode(noise(16_000)))) == 16_000


def test_a_limit_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that unpacks to hours is given up after the block that passes the limit."""
    exact = encode(noise(16_000))
    assert len(audio.load(exact, max_seconds=1.0)) == 16_000
    allowed = "longer than the 1 s allowed here"
    refused(encode(noise(16_001)), allowed, max_seconds=1.0)
    refused(noise(16_001), allowed, max_seconds=1.0, sampling_rate=16_000)
    samples = torch.from_numpy(noise(16_001))
    if find_spec("torchaudio"):
        refused(samples, allowed, max_seconds=1.0, sampling_rate=16_000, resampler="torchaudio")
    decoded = 0
    whole = audio_files.decode

    def counting(*arguments: object) -> audio_files.Blocks:
        nonlocal decoded
        for rate, block in whole(*arguments):
            decoded += len(block)
            yield rate, block

    monkeypatch.setattr(audio_files, "BLOCK_SAMPLES", 16_000)
    monkeypatch.setattr(audio_files, "decode", counting)
    packed = encode(np.zeros(16_000 * 60, np.float32), format="FLAC", subtype="PCM_16")
    refused(packed, allowed, max_seconds=1.0)
    assert decoded == 32_000


@pytest.mark.slow
def test_three_hours_in_bounded_memory(tmp_path: Path) -> None:
    """3 h of 8 kHz stereo: 691 MB of waveform, and at most a quarter of that beside it."""
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8000, 2, "PCM_16") as file:
        for _ in range(180):
            file.write(np.zeros((8000 * 60, 2), np.int16))
    code = (
        "import resource, sys; from qwen2audio_core import audio\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "audio.load(b''.join([open(sys.argv[2], 'rb').read()])); before = peak()\n"
        "waveform = audio.load(sys.argv[1])\n"
        "print(len(waveform), (peak() - before) / (4 * len(waveform)))"
    )
    command = [sys.executable, "-c", code, str(path), str(CLIPS / "en_capital.flac")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    samples, ratio = done.stdout.split()
    assert int(samples) == 3 * 3600 * 16_000
    assert float(ratio) < 1.25


# --- URLs


class Handler(http.server.BaseHTTPRequestHandler):
    wav = encode(noise(4000))

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        with contextlib.suppress(ConnectionError):
            getattr(
                self, "get_" + path.strip("/").split("/")[0].replace(".wav", ""), self.get_none
            )()

    def reply(self, body: bytes, length: int | None = None, code: int = 200, to: str = "") -> None:
        self.send_response(code)
        if to:
            self.send_header("Location", to)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def get_clip(self) -> None:
        self.reply(self.wav, len(self.wav))

    def get_unstated(self) -> None:
        self.reply(self.wav)

    def get_none(self) -> None:
        self.reply(b"", 0, 404)

    def get_html(self) -> None:
        self.reply(b"<html>log in first</html>")

    def get_empty(self) -> None:
        self.reply(b"", 0)

    def get_moved(self) -> None:
        self.reply(b"", 0, 302, "/clip.wav")

    def get_loop(self) -> None:
        self.reply(b"", 0, 302, "/loop")

    def get_far(self) -> None:  # a new address each time
        self.reply(b"", 0, 302, self.path + "/x")

    def get_ftp(self) -> None:
        self.reply(b"", 0, 302, "ftp://127.0.0.1/clip.wav")

    def get_local(self) -> None:
        self.reply(b"", 0, 302, "file:///etc/passwd")

    def get_short(self) -> None:
        self.reply(self.wav[:5000], len(self.wav))

    def get_big(self) -> None:
        self.reply(b"", 10**9)

    def get_endless(self) -> None:
        self.reply(b"")
        for _ in range(1000):
            self.wfile.write(bytes(10_000))

    def get_silent(self) -> None:
        time.sleep(1.5)

    def get_drip(self) -> None:
        self.reply(b"")
        for byte in self.wav[:150]:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def get_drip_header(self) -> None:
        for byte in b"HTTP/1.0 200 OK\r\nX-Header: " + b"x" * 120:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize(
    "page", ["clip.wav", "unstated", "moved", "clip/ü b.wav?a=b", "clip.wav#x"]
)
def test_url(server: str, page: str) -> None:
    assert torch.equal(audio.load(f"{server}/{page}"), audio.load(Handler.wav))


@pytest.mark.parametrize(
    ("page", "match"),
    [
        ("none.wav", "the server answered 404"),
        ("html", "not a wav"),
        ("empty", "is empty"),
        ("loop", "the server answered 302"),
        ("far", "the server answered 302"),
        ("ftp", "the server answered 302 redirect away from http"),
        ("local", "the server answered 302"),
        ("short", r"ended after 5000 of \d+ bytes"),
        ("big", "larger than 512 MiB"),
    ],
)
def test_bad_url(server: str, page: str, match: str) -> None:
    refused(f"{server}/{page}", match)


def test_url_without_a_stated_size_is_bounded(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_files, "MAX_BYTES", 2**20)
    refused(f"{server}/endless", "larger than 1 MiB")
    refused(io.BytesIO(bytes(2**20 + 1)), "larger than 1 MiB")
    refused("data:;base64," + "A" * (2**21), "of at most 1 MiB")


@pytest.mark.parametrize("page", ["silent", "drip", "drip_header"])
def test_slow_url(server: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_files, "READ_SECONDS", 0.3)
    monkeypatch.setattr(audio_files, "DOWNLOAD_SECONDS", 0.6)
    started = time.monotonic()
    refused(f"{server}/{page}", "silent for 0.3 s, or more than 0.6 s in all")
    assert time.monotonic() - started < 1.2


def test_url_that_leads_nowhere() -> None:
    for url in ("http://127.0.0.1:1/a.wav", "http://", "http://[", "http://127.0.0.1:port/a"):
        refused(url, "not downloaded")


def test_messages_keep_the_secrets_of_a_url(server: str) -> None:
    url = server.replace("//", "//user:password@") + "/none.wav?signature=secret"
    with pytest.raises(AudioError) as caught:
        audio.load(url)
    assert "/none.wav" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("user", "password", "secret"))


@pytest.mark.parametrize(
    "url", ["data:", "data:audio/wav;base64", "data:;base64,****", "data:;base64,QQQQQ"]
)
def test_bad_data_url(url: str) -> None:
    refused(url, "data: URL: (malformed|its base64 is broken)")


# --- torchaudio


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_both_resamplers_against_the_exact_answer(rate: int) -> None:
    """A sound of up to 5.5 kHz has one exact resampling: its spectrum, cut or padded with zeros.

    Relative error measured: soxr HQ 2.2e-7 to 2.6e-5, torchaudio 4.9e-7 to 7.8e-6. The bound, 2^-14
    or 6e-5, leaves 14-bit sound unharmed; linear interpolation misses it more than a hundredfold
    (and is exact where the rates divide). Towards 8 kHz the two filters differ by design.
    """
    pytest.importorskip("torchaudio", exc_type=Exception)
    spectrum = np.fft.rfft(noise(2 * rate))
    spectrum[int(2 * min(5500, 0.4 * rate)) :] = 0
    samples = (np.fft.irfft(spectrum) * np.hanning(2 * rate)).astype(np.float32)
    spectrum = np.fft.rfft(samples.astype(np.float64))
    spectrum.resize(16_001, refcheck=False)
    exact = torch.from_numpy(np.fft.irfft(spectrum, 32_000) * 16_000 / rate)

    def error(waveform: torch.Tensor) -> float:
        assert len(waveform) == 32_000
        return float((waveform - exact).norm() / exact.norm())

    tensor = torch.from_numpy(samples)
    assert error(audio.load(samples, sampling_rate=rate)) < 2**-14
    assert error(audio.load(tensor, sampling_rate=rate, resampler="torchaudio")) < 2**-14
    if rate % 16_000 == 0:
        return
    linear = np.interp(np.arange(32_000) / 16_000, np.arange(2 * rate) / rate, samples)
    assert error(torch.from_numpy(linear)) > 100 * 2**-14


def test_torchaudio_resampler_is_differentiable() -> None:
    pytest.importorskip("torchaudio", exc_type=Exception)
    samples = torch.from_numpy(noise(2, 4000)).requires_grad_()
    waveform = audio.load(samples, sampling_rate=8000, resampler="torchaudio")
    waveform.square().sum().backward()
    assert samples.grad is not None
    assert samples.grad.abs().max() > 0
    file = audio.load(encode(samples.detach().numpy().T, 8000), resampler="torchaudio")
    assert torch.allclose(file, waveform.detach(), rtol=0, atol=1e-7)


def test_without_torchaudio_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    refused(noise(4000), "cannot be imported", sampling_rate=8000, resampler="torchaudio")
    audio.load(torch.zeros(400), sampling_rate=16_000, resampler="torchaudio")  # not needed


# --- Long audio


def check_pieces(waveform: torch.Tensor, pieces: list[audio.Piece]) -> None:
    assert torch.equal(torch.cat([piece.waveform for piece in pieces]), waveform)
    assert all(321 <= len(piece.waveform) <= MAX_SAMPLES for piece in pieces)
    assert all(a.end == b.start for a, b in itertools.pairwise(pieces))
    assert pieces[0].start == 0
    for piece in pieces:
        assert piece.end - piece.start == pytest.approx(len(piece.waveform) / 16_000, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(321, 1_200_000)
    | st.integers(-5, 700).map(lambda extra: MAX_SAMPLES + extra)
    | st.integers(-5, 700).map(lambda extra: 2 * MAX_SAMPLES + extra),
    quiet=st.lists(st.integers(0, 1_600_000), max_size=4),
    seed=st.integers(0, 3),
)
def test_pieces_are_the_waveform(samples: int, quiet: list[int], seed: int) -> None:
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    for start in quiet:
        waveform[start : start + 4000] = 0
    notices: list[str] = []
    pieces = audio.split(waveform, notice=notices.append)
    check_pieces(waveform, pieces)
    assert len(notices) == (samples > MAX_SAMPLES)
    assert len(pieces) <= -(-samples // (25 * 16_000))
    again = audio.split(waveform, notice=notices.append)
    assert [piece.end for piece in again] == [piece.end for piece in pieces]


def test_split_cuts_in_the_pauses() -> None:
    waveform = torch.from_numpy(noise(70 * 16_000))
    pauses = (26.0, 28.0, 56.5, 59.0)  # of each pair the wider one is the quieter
    for at, factor in zip(pauses, (0.01, 0.001, 0.001, 0.01), strict=True):
        waveform[int(at * 16_000) : int((at + 0.2) * 16_000)] *= factor
    notices: list[str] = []
    pieces = audio.split(waveform, name="talk.wav", notice=notices.append)
    check_pieces(waveform, pieces)
    for cut, pause in zip((pieces[0].end, pieces[1].end), (28.0, 56.5), strict=True):
        assert pause + 0.014 <= cut <= pause + 0.186  # the window of 30 ms lies within the pause
    assert notices == [
        f"talk.wav is 70.0 s long: split into 3 pieces at {pieces[0].end:.1f} s,"
        f" {pieces[1].end:.1f} s"
    ]


def test_split_of_silence_makes_the_longest_pieces() -> None:
    pieces = audio.split(torch.zeros(100 * 16_000), notice=lambda line: None)
    assert [round(piece.end, 1) for piece in pieces] == [30.0, 60.0, 90.0, 100.0]


def test_split_real_clips(shared: Path) -> None:
    for file, count in (("humpback_64s.ogg", 3), ("it_azure.flac", 3), ("jfk.wav", 1)):
        notices: list[str] = []
        waveform = audio.load(shared / "audio" / file)
        pieces = audio.split(waveform, name=file, notice=notices.append)
        check_pieces(waveform, pieces)
        assert len(pieces) == count
        assert len(notices) == (count > 1)


def test_cut_and_error() -> None:
    waveform = torch.from_numpy(noise(MAX_SAMPLES + 1))
    notices: list[str] = []
    (piece,) = audio.split(waveform, "cut", name="talk.wav", notice=notices.append)
    assert torch.equal(piece.waveform, waveform[:MAX_SAMPLES])
    assert (piece.start, piece.end) == (0.0, 30.0)
    assert notices == ["talk.wav is 30.0 s long: only its first 30 s are used"]
    with pytest.raises(AudioError, match="the model hears 30 s at once"):
        audio.split(waveform, "error", name="talk.wav")
    with pytest.raises(AudioError, match="long is 'trim'"):
        audio.split(waveform[:1000], "trim")  # type: ignore[arg-type]
    for long in ("split", "cut"):  # never silent
        with pytest.warns(UserWarning, match="is 30.0 s long"):
            audio.split(waveform, long)
    for long in ("split", "cut", "error"):
        (piece,) = audio.split(waveform[:MAX_SAMPLES], long)
        assert piece.waveform.data_ptr() == waveform.data_ptr()  # a view


def test_too_short_to_hear() -> None:
    assert len(audio.split(torch.zeros(321))) == 1
    for samples in (0, 1, 320):
        assert clip_lengths(samples).audio_tokens == 0
        said = f"tick.wav: too short to be heard, {samples / 16:.3g} ms: .* more than 20 ms"
        with pytest.raises(AudioError, match=said):
            audio.split(torch.zeros(samples), name="tick.wav")
    with pytest.raises(AudioError, match="expected one mono waveform"):
        audio.split(torch.zeros(2, 1000))


# --- Clips that ship with the package


def test_shipped_clips() -> None:
    entries = json.loads((CLIPS / "clips.json").read_text(encoding="utf-8"))
    files = sorted(CLIPS.glob("*.flac"))
    assert sorted(entry["file"] for entry in entries) == [path.name for path in files]
    languages = {entry.get("language") for entry in entries} - {None}
    assert languages == {"en", "zh", "yue", "ja", "de", "fr", "es", "it"}
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for entry in entries:
        path = CLIPS / entry["file"]
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert path.stat().st_size < 100_000
        waveform = audio.load(path)
        assert len(waveform) / 16_000 == pytest.approx(entry["seconds"], abs=0.005)
        assert waveform.abs().max() == pytest.approx(0.7, abs=1e-3)
        assert entry.get("transcript") or entry.get("description")
