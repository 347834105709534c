"""Under which names a server that only this machine reaches may be called.

A web page in somebody's browser may have a name of its own point to this machine (DNS rebinding):
the server then sees that name, and no other sign of it.
"""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, or a short form such as 127.1
        return host == "localhost" or bool(re.fullmatch(r"127(\.\d+)+", host))


def own_names(host: str) -> frozenset[str]:
    """The names of a server that listens there."""
    return frozenset({*LOOPBACK, host})


def name_in(url: str) -> str | None:
    """The host that a URL names, such as a header Origin, or Host behind //; None for nonsense."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
