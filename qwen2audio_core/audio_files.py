"""Path, URL, bytes or file object to blocks of samples: open it, and decode it.

soundfile (libsndfile) decodes wav, flac, mp3, ogg, opus and aiff; PyAV (FFmpeg), where installed,
the rest. A file that ends before its header says is an error, never a shorter clip in silence.
"""

import base64
import binascii
import http.client
import io
import itertools
import os
import re
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

import numpy as np

from qwen2audio_core import install
from qwen2audio_core.errors import AudioError

MAX_HOURS = 12  # of one clip; 2.8 GB as float32 at 16 kHz
MAX_BYTES = 512 * 2**20  # of a download, a data: URL or a file object
READ_SECONDS = 20.0  # that a server may stay silent
DOWNLOAD_SECONDS = 300.0  # for a whole download, from the name look-up to the last byte
# Decoded at once, all channels together: 32 MiB as float32, 87 s of 48 kHz stereo. An mp3's further
# blocks can differ from one long read in the last bit of float32.
BLOCK_SAMPLES = 2**23

# Of all that FFmpeg opens, only containers of sound: a playlist could make it read other files.
AV_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,mp3,flac,ogg,wav,w64,aiff,caf,asf,amr,ac3"

# Endings of files that sound is read from, in small letters. Others are tried too.
SUFFIXES = {
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf"),
    *(".m4a", ".aac", ".mp4", ".mov", ".3gp", ".3g2", ".mkv", ".mka", ".webm"),  # through PyAV
    *(".wma", ".asf", ".amr", ".ac3"),
}

Blocks = Generator[
    tuple[int, np.ndarray], None, None
]  # Hz, samples (n, channels) as load takes them


def one_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def source_name(source: Any) -> str:
    """What to call a source in messages: short, printable, and without a URL's secrets."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "audio bytes"
    name = getattr(source, "name", "file object") if hasattr(source, "read") else source
    name = str(name)
    if name[:5].lower() == "data:":
        return "data: URL"
    if re.match("https?://", name, re.I):  # credentials, keys and signatures
        name = re.sub("//[^/@]*@", "//", re.split("[?#]", name)[0], count=1)
    name = name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}"
    return name if name.isprintable() and name else repr(name)


# Where the bytes are


def open_source(source: Any, name: str) -> BinaryIO:
    """Open the encoded bytes of a path, URL, bytes or file object as a seekable binary file.

    errors   AudioError: not found, not readable, larger than 512 MiB (paths have no limit), or a
             download that took more than 300 s
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return _buffer(source, name)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise AudioError(f"audio is a {kind}, expected a path, URL, bytes, file, array or tensor")
    scheme, path = _place(source, name)
    if scheme == "data":
        return io.BytesIO(_data_url(path, name))
    if scheme in ("http", "https"):
        return io.BytesIO(_download(path, name))
    try:
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
    except (OSError, ValueError) as error:
        raise _unopened(name, error) from error
    if file.seekable():
        return file
    with file:  # a pipe
        return _buffer(file, name)


def check_local(source: str) -> None:
    """Raise open_source's AudioError for a file on this machine that cannot be opened.

    For a word in time, before a model is loaded. URLs and pipes are left alone: the shell's <(...)
    can be opened once.
    """
    name = source_name(source)
    scheme, path = _place(source, name)
    if scheme not in ("", "file"):
        return
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            open(path, "rb").close()
    except (OSError, ValueError) as error:
        raise _unopened(name, error) from error


def stated_seconds(source: str) -> float | None:
    """How long a file on this machine is, as its head says; None where it says nothing of use. That
    it can be read at all, and to its end, is another question."""
    if "://" in source or source.startswith("data:"):
        return None
    try:
        import soundfile

        head = soundfile.info(source)
    except (ImportError, RuntimeError, OSError, ValueError):
        return None
    return head.frames / head.samplerate if 0 < head.frames < 2**40 else None


def _place(source: str | os.PathLike[str], name: str) -> tuple[str, str]:
    """A URL's scheme, "" for a path, and where that leads: a path for "file", else the source."""
    path = os.fspath(source)
    if not isinstance(source, str):
        return "", path
    match = re.match("([a-z][a-z0-9+.-]+)://|(data|file):", source, re.I)
    scheme = (match[1] or match[2]).lower() if match else ""
    if scheme not in ("", "file", "data", "http", "https"):
        raise AudioError(f"{name}: only http, https, data and file URLs are read, not {scheme}")
    if scheme == "file":
        path = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    return scheme, path


def _unopened(name: str, error: Exception) -> AudioError:
    return AudioError(
        f"{name}: cannot open it: {getattr(error, 'strerror', None) or one_line(error)}"
    )


def _buffer(file: Any, name: str) -> io.BytesIO:
    try:
        data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot read it: {one_line(error)}") from error
    if not isinstance(data, (bytes, bytearray)):
        raise AudioError(
            f"{name}: read() gives {type(data).__name__}, expected a file opened as 'rb'"
        )
    if len(data) > MAX_BYTES:
        raise AudioError(f"{name}: larger than {MAX_BYTES >> 20} MiB: give its path instead")
    return io.BytesIO(data)


def _data_url(url: str, name: str) -> bytes:
    kind, comma, body = url[5:].partition(",")
    if not comma or len(body) > MAX_BYTES // 3 * 4:
        expected = f"expected 'data:audio/wav;base64,...' of at most {MAX_BYTES >> 20} MiB"
        raise AudioError(f"{name}: malformed or too large, {expected}")
    data = urllib.parse.unquote_to_bytes(body)
    if not kind.lower().endswith(";base64"):
        return data
    data = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise AudioError(f"{name}: its base64 is broken ({one_line(error)})") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, "redirect away from http", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, name: str) -> bytes:
    outcome: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(_fetch(url, name, time.monotonic() + DOWNLOAD_SECONDS))
        except Exception as error:
            outcome.append(error)

    # Only a second thread bounds the whole: a name look-up or a dripping header has no time-out.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, bytes):
        return result
    if isinstance(result, AudioError):
        raise result
    reason = getattr(result, "reason", result)
    if isinstance(result, urllib.error.HTTPError):
        why = f"the server answered {result.code} {one_line(Exception(reason))}"
    elif isinstance(reason, TimeoutError):
        why = f"silent for {READ_SECONDS:g} s, or more than {DOWNLOAD_SECONDS:g} s in all"
    else:
        why = one_line(reason if isinstance(reason, Exception) else result)
    raise AudioError(f"{name}: not downloaded: {why}") from result


def _fetch(url: str, name: str, deadline: float) -> bytes:
    url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # only spaces and non-ASCII change
    request = urllib.request.Request(url, headers={"User-Agent": "qwen2audio"})
    data = bytearray()
    with urllib.request.build_opener(_Redirects).open(request, timeout=READ_SECONDS) as response:
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else 0
        # read1 returns with each packet; read would wait for a full buffer, however slow it fills.
        while len(data) <= MAX_BYTES >= expected and (packet := response.read1(2**16)):
            data += packet
            if time.monotonic() > deadline:
                raise TimeoutError
    if max(len(data), expected) > MAX_BYTES:
        raise AudioError(f"{name}: not downloaded: larger than {MAX_BYTES >> 20} MiB")
    if len(data) < expected:
        raise http.client.HTTPException(f"it ended after {len(data)} of {expected} bytes")
    return bytes(data)


# How to decode them


def decode(file: BinaryIO, name: str) -> Blocks:
    """Decode a file from its beginning, block by block.

    yields   sampling rate in Hz, samples (n, channels) float or PCM integers
    errors   AudioError: empty, not audio, broken, cut short; PyAV needed and not installed
    """
    try:
        import soundfile
    except ImportError as error:
        what = f"{name}: reading files needs soundfile"
        raise AudioError(what, install.package("soundfile")) from error
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror or error})") from error
    if size == 0:
        raise AudioError(f"{name}: is empty (0 bytes)")
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        if error.code in (1, 4):  # a format or an encoding that libsndfile does not know
            yield from _decode_av(file, name, "not a wav, flac, mp3, ogg, opus or aiff file")
            return
        raise AudioError(f"{name}: broken or cut short ({error.error_string})") from error
    except TypeError as error:  # it wants to be told the layout of a file called .raw
        raise AudioError(f"{name}: raw samples do not say their rate: pass an array") from error
    with sound:
        rate, frames = sound.samplerate, sound.frames
        starts, run, stated = _streams(file, sound.format, name)
        if len(starts) > 1:  # of which libsndfile reads the first
            for start, end in itertools.pairwise([*starts, size]):
                yield from decode(io.BufferedReader(_Part(file, start, end)), name)
            return
        # libsndfile stops an mp3 where the header, or a guess from the first frame, says; and it
        # cannot read a flac of unstated length, for which it gives 2^63 - 1.
        if run > frames + 4 * 1152 or frames >= 2**62:
            yield from _decode_av(file, name, "its header does not give its length")
            return
        check_hours(frames / rate, name)
        _check_end(file, sound, name)
        heard = 0
        while heard < frames:
            try:
                block = sound.read(BLOCK_SAMPLES // sound.channels, dtype="float32", always_2d=True)
            except soundfile.SoundFileRuntimeError as error:
                why = getattr(error, "error_string", error)
                raise AudioError(f"{name}: broken or cut short ({why})") from error
            if not len(block):
                break
            heard += len(block)
            yield rate, block
        if heard < frames and stated:
            raise _cut_short(name, heard / rate, frames / rate)


def check_hours(seconds: float, name: str) -> None:
    """Raise AudioError for more than 12 hours."""
    if seconds > MAX_HOURS * 3600:
        raise AudioError(f"{name}: longer than {MAX_HOURS} hours: cut it into several files")


def _cut_short(name: str, found: float, declared: float) -> AudioError:
    return AudioError(
        f"{name}: cut short, holds {found:.2f} s of the {declared:.2f} s it declares:"
        " fetch it again, or convert it to keep what is there"
    )


def _check_end(file: BinaryIO, sound: Any, name: str) -> None:
    # What libsndfile would quietly read as a shorter file.
    size_line = r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)"
    if match := re.search(size_line, sound.extra_info, re.M):
        declared, found = int(match[1]), int(match[2])
        # Some writers count the header's 44 bytes; streaming ones put the largest number they have.
        if found + 44 < declared < 0x7FFF0000:
            seconds = sound.frames / sound.samplerate
            raise _cut_short(name, seconds, seconds * declared / max(found, 1))
    if sound.format == "OGG":
        position = file.tell()
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**17))  # a page has at most 65,307 bytes
        tail = file.read()
        file.seek(position)
        page = tail[tail.rfind(b"OggS") :]  # RFC 3533, section 6: byte 26 counts the segments
        # Not its end-of-stream flag, which some recorders of voice messages never set.
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise AudioError(f"{name}: cut short, its last ogg page is incomplete")


class _Part(io.RawIOBase):
    # The bytes [start, end) of a file as a file.

    def __init__(self, file: BinaryIO, start: int, end: int):
        self._file, self._start, self._size, self._at = file, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _streams(file: BinaryIO, form: str, name: str) -> tuple[list[int], int, bool]:
    # Where each of the recordings that were put one behind the other begins; for mp3 also the
    # samples in the unbroken run of frames from the first, and whether a header states the length.
    # AudioError where more follows behind bytes that belong to none: libsndfile would stop there.
    position = file.tell()
    try:
        starts, run, stated, end = [0], 0, True, 0
        if form == "MP3":
            starts, run, stated, end = _mp3_streams(file)
        elif form == "OGG":
            starts, end = _ogg_streams(file)
        elif form == "FLAC":
            starts = _flac_streams(file)
        if end and _more_behind(file, end, form):
            raise AudioError(
                f"{name}: broken or cut short: byte {end} and what follows are no {form.lower()}"
            )
        return starts, run, stated
    finally:
        file.seek(position)


def _more_behind(file: BinaryIO, offset: int, form: str) -> bool:
    # Whether a recording goes on or begins anew within 4 MiB of bytes that are none. Three mp3
    # frames in a row, or an ogg page that begins a stream, are hardly ever met by chance.
    begin = rb"OggS\0[\x02\x06]" if form == "OGG" else rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"
    places = _places(file, begin, offset, 2**22)
    return any(form == "OGG" or _mp3_run(file, place, 3) for place in places)


def _mp3_run(file: BinaryIO, offset: int, count: int) -> bool:
    # Whether so many frames follow one another there.
    for _ in range(count):
        file.seek(offset)
        frame = _mp3_frame(file.read(4))
        if frame is None:
            return False
        offset += frame[0]
    return True


def _places(file: BinaryIO, pattern: bytes, offset: int, most: int = 2**62) -> Iterator[int]:
    # Where a pattern of at most 16 bytes stands, among so many bytes from an offset on.
    for start in range(offset, offset + most, 2**20):
        file.seek(start)
        block = file.read(2**20 + 16)
        for found in re.finditer(pattern, block):
            if found.start() < 2**20:
                yield start + found.start()
        if len(block) <= 2**20:
            return


def _ogg_streams(file: BinaryIO) -> tuple[list[int], int]:
    # RFC 3533, sections 4 and 6: streams that are mixed begin together, before any other page.
    starts, offset, beginning = [], 0, False
    while (
        file.seek(offset) == offset and (page := file.read(27))[:4] == b"OggS" and len(page) == 27
    ):
        if page[5] & 2 and not beginning:
            starts.append(offset)
        beginning = bool(page[5] & 2)
        offset += 27 + page[26] + sum(file.read(page[26]))
    return starts or [0], offset


def _flac_streams(file: BinaryIO) -> list[int]:
    # RFC 9639, section 8: the marker and the header of STREAMINFO, 34 bytes, last block or not.
    starts = list(_places(file, rb"fLaC[\x00\x80]\x00\x00\x22", 0))
    return [0, *starts[1:]]  # a tag may stand before the first


def _mp3_streams(file: BinaryIO) -> tuple[list[int], int, bool, int]:
    file.seek(0)
    offset = _mp3_tag(file.read(16))
    file.seek(offset)
    head = file.read(4096)
    stated = any(tag in head for tag in (b"Xing", b"Info", b"VBRI"))
    offset += next((i for i in range(len(head)) if _mp3_frame(head[i : i + 4])), 0)
    starts, run, begin = [0], 0, 0  # begin: where a recording behind a tag would
    while file.seek(offset) == offset:
        head = file.read(16)
        if frame := _mp3_frame(head[:4]):
            if begin and run:
                starts.append(begin)
            run, begin = run + frame[1] * (len(starts) == 1), 0
            offset += frame[0]
        elif tag := _mp3_tag(head):
            begin = offset = offset + tag
        else:
            break
    return starts, run, stated, offset if run else 0


def _mp3_tag(head: bytes) -> int:
    # Bytes of the ID3v2, ID3v1 or APEv2 tag that begins so, 0 for none.
    if head[:3] == b"ID3" and len(head) >= 10:  # its size in four digits of seven bits
        size = sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
        return size + (20 if head[5] & 16 else 10)  # with a footer, or without
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) >= 16:
        return 32 + int.from_bytes(head[12:16], "little")
    return 0


def _mp3_frame(header: bytes) -> tuple[int, int] | None:
    # Bytes and samples of the layer III frame that these 4 bytes begin. ISO 11172-3, 2.4.1.3.
    bits = int.from_bytes(header, "big")
    version, layer, bitrate, rate = bits >> 19 & 3, bits >> 17 & 3, bits >> 12 & 15, bits >> 10 & 3
    sync = len(header) == 4 and bits >> 21 == 0x7FF
    if not sync or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    if version == 3:  # MPEG-1
        kbps = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[bitrate - 1]
    else:
        kbps = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[bitrate - 1]
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 1152 if version == 3 else 576
    return samples * kbps * 125 // hertz + (bits >> 9 & 1), samples


def _decode_av(file: BinaryIO, name: str, why: str) -> Blocks:
    try:
        import av
    except ImportError as error:
        what = f"{name}: {why}; m4a, aac, webm and mp4 need PyAV"
        raise AudioError(what, install.extra("av")) from error
    file.seek(0)
    heard, rate, declared = 0, 1, 0.0
    try:
        # A file object and not a path, which FFmpeg could take for a protocol.
        options = {"format_whitelist": AV_FORMATS}
        # PyAV takes any bytes for a title from 19 on; before, it has to be told to.
        titles = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
        with av.open(file, options=options, **titles) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: has no sound track")
            if (tracks := len(container.streams.audio)) > 1:
                raise AudioError(
                    f"{name}: has {tracks} sound tracks, and which is meant is not said: take one"
                    " out, such as with ffmpeg -i FILE -map 0:a:0 ONE.wav"
                )
            stream = container.streams.audio[0]
            rate = stream.rate or 1
            # Interleaved, because PyAV 18.1 crashes on the planes of eight channels.
            interleave = av.AudioResampler(format="flt")
            for decoded in itertools.chain(container.decode(stream), [None]):  # None flushes
                for frame in interleave.resample(decoded):
                    heard, rate = heard + frame.samples, frame.sample_rate
                    yield rate, frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
            if stream.duration and stream.time_base and container.format.name.startswith("mov"):
                declared = float((stream.duration - (stream.start_time or 0)) * stream.time_base)
            elif container.duration and container.format.name.startswith("matroska"):
                # It is the longest track's: with pictures beside the sound it says nothing.
                declared = container.duration / 1e6 if len(container.streams) == 1 else 0.0
    except AudioError:
        raise
    except (av.FFmpegError, ValueError) as error:  # ValueError: its rate or channels change midway
        why = f"broken or cut short after {heard / rate:.2f} s" if heard else why
        detail = getattr(error, "strerror", None) or one_line(error)
        raise AudioError(f"{name}: {why} ({detail})") from error
    # A declared duration counts whole frames and may count one of priming; the longest have 2048.
    if heard < declared * rate - 2 * 2048:
        raise _cut_short(name, heard / rate, declared)
