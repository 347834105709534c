"""Downloads on behalf of strangers: only from public addresses, within bounds, on the event loop.

A name is resolved once, every address it has is checked, and the connection goes to an address that
was checked: a name that answers differently the second time (DNS rebinding) gains nothing. Every
redirect starts over. Proxies of the environment are not used, they would resolve the name again.
"""

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from functools import cache
from urllib.parse import quote, urljoin, urlsplit

from qwen2audio_core.audio_files import one_line, source_name
from qwen2audio_core.errors import AudioError

REDIRECTS = 5
# Addresses within which every public IPv6 address lies, and one that stands for an IPv4 address.
UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Public by their number and yet a cloud's own to its machines: Azure's agent, Oracle's metadata.
CLOUD = (ipaddress.IPv4Address("168.63.129.16"), ipaddress.IPv4Address("192.0.0.192"))


async def fetch(url: str, *, private: bool, max_bytes: int, seconds: float) -> bytes:
    """The bytes behind an http or https URL.

    private    also connect to addresses that are not public: loopback, home and company networks,
               link-local ones and with them the metadata of clouds
    max_bytes  most bytes of the content
    seconds    for all of it, name look-up and redirects included
    errors     AudioError, without the secrets of the URL
    """
    import h11

    name = source_name(url)
    try:
        async with asyncio.timeout(seconds):
            for _ in range(REDIRECTS + 1):
                target = _target(url, name)
                addresses = await _resolve(target, name, private)
                content = await _get(target, addresses, max_bytes, name)
                if isinstance(content, bytes):
                    return content
                url = _joined(url, content, name)
    except TimeoutError as error:
        raise AudioError(f"{name}: not downloaded: it took more than {seconds:g} s") from error
    except (OSError, h11.ProtocolError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise AudioError(f"{name}: not downloaded: {why}") from error
    raise AudioError(f"{name}: not downloaded: more than {REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the Internet and not to this machine's surroundings."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in UNICAST or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast and ip not in CLOUD


@dataclass(frozen=True)
class _Target:
    secure: bool
    host: str  # as the certificate and the Host header name it
    port: int
    path: str  # with the query

    @property
    def header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def _joined(url: str, location: str, name: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise AudioError(f"{name}: it leads to what is not a URL ({one_line(error)})") from error


def _target(url: str, name: str) -> _Target:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:  # UnicodeError among them
        raise AudioError(f"{name}: not a URL ({one_line(error)})") from error
    if parts.scheme not in ("http", "https"):
        raise AudioError(f"{name}: not downloaded: leads away from http, to {parts.scheme}")
    if not host or any(character.isspace() for character in host):
        raise AudioError(f"{name}: not a URL (it names no host)")
    if "@" in parts.netloc:
        raise AudioError(f"{name}: not downloaded: a name and password in a URL are not sent")
    secure = parts.scheme == "https"
    path = quote(parts.path or "/", safe="%/:=&~+!$,;'@()*[]")
    query = "?" + quote(parts.query, safe="%/:=&?~+!$,;'@()*[]") if parts.query else ""
    return _Target(secure, host, port or (443 if secure else 80), path + query)


async def _resolve(target: _Target, name: str, private: bool) -> list[str]:
    """Every address of the host, all of them allowed."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is too long
        raise AudioError(f"{name}: not a URL ({one_line(error)})") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not private and not all(map(is_public, addresses)):
        raise AudioError(f"{name}: not downloaded: its address is not a public one")
    return addresses


async def _get(target: _Target, addresses: list[str], max_bytes: int, name: str) -> bytes | str:
    """One GET: the content, or where it leads."""
    reader, writer = await _connect(target, addresses)
    try:
        return await _exchange(target, reader, writer, max_bytes, name)
    finally:
        writer.transport.abort()


async def _connect(
    target: _Target, addresses: list[str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    failure: OSError | None = None
    for address in addresses:  # numbers, so that nothing is looked up again
        try:
            return await asyncio.open_connection(
                address,
                target.port,
                ssl=_certificates() if target.secure else None,
                server_hostname=target.host if target.secure else None,
            )
        except OSError as error:
            failure = error
    raise failure or OSError("the host has no address")


async def _exchange(
    target: _Target,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    max_bytes: int,
    name: str,
) -> bytes | str:
    import h11

    connection = h11.Connection(h11.CLIENT)
    headers = {
        "Host": target.header,
        "User-Agent": "qwen2audio",
        "Accept": "audio/*, */*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    request = h11.Request(method="GET", target=target.path, headers=list(headers.items()))
    for event in (request, h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    content = bytearray()
    while True:
        found = connection.next_event()
        if found is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**16))
        elif isinstance(found, h11.Response):
            given = {key.lower(): value.decode("latin-1") for key, value in found.headers}
            if found.status_code in (301, 302, 303, 307, 308) and given.get(b"location"):
                return given[b"location"]
            if found.status_code != 200:
                raise AudioError(f"{name}: not downloaded: the server answered {found.status_code}")
            if int(given.get(b"content-length", 0)) > max_bytes:
                raise _too_large(name, max_bytes)
        elif isinstance(found, h11.Data):
            content += found.data
            if len(content) > max_bytes:
                raise _too_large(name, max_bytes)
        elif isinstance(found, h11.EndOfMessage):
            return bytes(content)
        elif not isinstance(found, h11.InformationalResponse):
            raise AudioError(f"{name}: not downloaded: the server hung up")


def _too_large(name: str, max_bytes: int) -> AudioError:
    return AudioError(f"{name}: not downloaded: larger than the {max_bytes:,} bytes allowed here")


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()
