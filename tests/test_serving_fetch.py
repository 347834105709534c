"""Downloads for strangers: which addresses, which redirects, how much, how long."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from qwen2audio_core.errors import AudioError
from qwen2audio_core.serving import fetch as fetching

pytest.importorskip("h11", reason="needs the extra serve")


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "1.1.1.1", "193.0.6.139", "172.32.0.1", "100.128.0.1", "169.253.0.1"),
        *("2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"),
    ],
)
def test_public_addresses(address):
    assert fetching.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "169.254.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "198.18.0.1"),
        *("192.0.2.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254"),
        *("ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "fec0::1", "100::1"),
    ],
)
def test_addresses_of_this_machine_and_its_surroundings(address):
    assert not fetching.is_public(address)


@contextmanager
def serving(*answers, address="127.0.0.1", context=None):
    """A server that gives each connection the next answer; yields its port and what it was asked.

    An answer is bytes, or a list of bytes and of seconds to wait.
    """
    asked = []
    listener = socket.create_server((address, 0))

    def work():
        for answer in answers:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(peer, server_side=True) if context else peer as peer:
                    peer.settimeout(5)
                    request = b""
                    while b"\r\n\r\n" not in request and (more := peer.recv(4096)):
                        request += more
                    asked.append(request.decode())
                    for part in answer if isinstance(answer, list) else [answer]:
                        if isinstance(part, bytes):
                            peer.sendall(part)
                        else:
                            time.sleep(part)
            except OSError:
                continue

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], asked
    finally:
        listener.close()


def ok(content, *headers):
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(content), *headers]
    return b"\r\n".join([*head, b"", content])


def moved(location, code=302):
    return f"HTTP/1.1 {code} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def get(url, *, private=True, max_bytes=1000, seconds=5.0):
    return asyncio.run(fetching.fetch(url, private=private, max_bytes=max_bytes, seconds=seconds))


@pytest.fixture
def names(monkeypatch):
    """name -> addresses, one list for each time it is asked for; and only 127.0.0.1 is public."""
    book, asked = {}, []

    async def look_up(self, host, port, **options):
        asked.append(host)
        try:
            addresses = book[host].pop(0)
        except (KeyError, IndexError):
            raise socket.gaierror(-2, "Name or service not known") from None
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    book["asked"] = asked
    return book


def test_content_and_what_is_sent():
    with serving(ok(b"sound")) as (port, asked):
        url = f"http://127.0.0.1:{port}/a%20b/%C3%BC ü?x=1&y=[2]#part"
        assert get(url) == b"sound"
    line, *headers = asked[0].split("\r\n")
    assert line == "GET /a%20b/%C3%BC%20%C3%BC?x=1&y=[2] HTTP/1.1"
    assert f"Host: 127.0.0.1:{port}" in headers and "Accept-Encoding: identity" in headers
    assert not any(header.lower().startswith(("cookie", "authorization")) for header in headers)


def test_chunks_and_closed_connections_and_patience():
    chunked = (
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nsou\r\n2\r\nnd\r\n0\r\n\r\n"
    )
    with serving(chunked, b"HTTP/1.0 200 OK\r\n\r\nsound", [ok(b"sound")[:-2], 0.1, b"nd"]) as (
        port,
        _,
    ):
        for _ in range(3):
            assert get(f"http://127.0.0.1:{port}/") == b"sound"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "the server answered 404"),
        (b"HTTP/1.1 206 Partial\r\n\r\nx", "the server answered 206"),
        (ok(b"x" * 1001), "larger than the 1,000 bytes"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 2000, "larger than the 1,000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "not downloaded"),
        (b"rubbish\r\n\r\n", "not downloaded"),
        (b"", "not downloaded"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "not downloaded"),
        (moved("file:///etc/passwd"), "leads away from http, to file"),
        (moved("ftp://127.0.0.1/"), "leads away from http, to ftp"),
    ],
)
def test_answers_that_are_refused(answer, message):
    with serving(answer) as (port, _), pytest.raises(AudioError, match=message) as caught:
        get(f"http://127.0.0.1:{port}/a.wav?secret=1")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:///path", "names no host"),
        ("http://127.0.0.1:99999/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://" + "a" * 70 + ".com/", "not a URL"),
        ("http://user:word@127.0.0.1/", "a name and password in a URL are not sent"),
        ("gopher://127.0.0.1/", "leads away from http"),
        ("http://127.0.0.1:1/", "not downloaded"),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(AudioError, match=message) as caught:
        get(url)
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_this_machine_by_any_spelling(host):
    with serving(ok(b"secret")) as (port, asked):
        with pytest.raises(AudioError, match="not downloaded"):
            get(f"http://{host}:{port}/", private=False)
        assert asked == []


def test_every_redirect_is_checked(names):
    """The first host is a public one; it sends the server home."""
    with (
        serving(ok(b"secret"), address="127.0.0.2") as (inside, asked),
        serving(moved(f"http://127.0.0.2:{inside}/")) as (port, _),
    ):
        names["sound.test"], names["127.0.0.2"] = [["127.0.0.1"]], [["127.0.0.2"]]
        with pytest.raises(AudioError, match="its address is not a public one"):
            get(f"http://sound.test:{port}/", private=False)
        assert asked == []
    assert names["asked"] == ["sound.test", "127.0.0.2"]


def test_redirects_are_followed_and_counted(names):
    with serving(moved("/b"), moved("c?d", 301), ok(b"sound")) as (port, asked):
        names["sound.test"] = [["127.0.0.1"]] * 3
        assert get(f"http://sound.test:{port}/a/", private=False) == b"sound"
        assert [one.split()[1] for one in asked] == ["/a/", "/b", "/c?d"]
    with serving(*[moved("/again")] * 9) as (port, asked):
        names["sound.test"] = [["127.0.0.1"]] * 9
        with pytest.raises(AudioError, match="more than 5 redirects"):
            get(f"http://sound.test:{port}/", private=False)
        assert len(asked) == 6
    names["sound.test"] = [["127.0.0.1"]]
    with serving(moved("http://[x")) as (port, _), pytest.raises(AudioError, match="not a URL"):
        get(f"http://sound.test:{port}/", private=False)


def test_a_name_that_changes_its_address_gains_nothing(names):
    """DNS rebinding: public when it is checked, private a moment later."""
    with serving(ok(b"sound")) as (port, asked):
        names["sound.test"] = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]]
        assert get(f"http://sound.test:{port}/", private=False) == b"sound"
        assert f"Host: sound.test:{port}" in asked[0]
    assert names["asked"] == ["sound.test"]  # once; the connection went to what was checked


def test_one_private_address_among_public_ones_is_enough(names):
    with serving(ok(b"sound")) as (port, asked):
        names["sound.test"] = [["127.0.0.1", "127.0.0.2"]]
        with pytest.raises(AudioError, match="not a public one"):
            get(f"http://sound.test:{port}/", private=False)
        assert asked == []
        names["sound.test"] = [["127.0.0.3", "127.0.0.1"]]  # nobody listens at the first
        assert get(f"http://sound.test:{port}/", private=True) == b"sound"
        with pytest.raises(AudioError, match="Name or service not known"):
            get("http://other.test/", private=False)


@pytest.mark.parametrize(
    "answer",
    [
        [5.0],
        [b"H", 0.2] * 10,  # a head that drips
        [b"HTTP/1.0 200 OK\r\n\r\n", *[b"x", 0.2] * 10],
        [b"HTTP/1.1 102 Wait\r\n\r\n", 0.2] * 10,
    ],
)
def test_slowness_has_an_end(answer):
    with serving(answer) as (port, _):
        began = time.monotonic()
        with pytest.raises(AudioError, match=r"more than 0\.4 s"):
            get(f"http://127.0.0.1:{port}/", seconds=0.4)
        assert time.monotonic() - began < 1.5


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(ok(b"sound")) as (port, _):
        assert get(f"http://127.0.0.1:{port}/") == b"sound"


def test_certificates_are_those_of_the_name(names, monkeypatch, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl, to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        f" -subj /CN=sound.test -addext subjectAltName=DNS:sound.test"
        f" -keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    with serving(ok(b"a"), ok(b"b"), ok(b"c"), context=server) as (port, _):
        for host in ("sound.test", "other.test"):
            names[host] = [["127.0.0.1"]] * 2
        with pytest.raises(AudioError, match="not downloaded"):  # by nobody we know
            get(f"https://sound.test:{port}/", private=False)
        monkeypatch.setattr(fetching, "_certificates", lambda: trusting)
        with pytest.raises(AudioError, match="not downloaded"):
            get(f"https://other.test:{port}/", private=False)
        assert get(f"https://sound.test:{port}/", private=False) == b"c"
