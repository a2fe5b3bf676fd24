"""With this folder on PYTHONPATH no Python process reaches beyond this machine.

Python imports `sitecustomize` when it starts, so the rule holds in kernels, in pytest's workers and in torchrun's children
too. An audit hook refuses the call before anything is sent: it sees every socket that Python opens, whichever library
opens it, and no program can take it off again. Libraries that open sockets outside Python (gloo, the hub's downloader)
are kept at home by environment variables beside it (tooling/sandbox.py).

Allowed: Unix sockets, addresses of the loopback interface, and names that mean it.
"""

import socket
import sys

UNIX = getattr(socket, "AF_UNIX", None)
WATCHED = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
HERE = {"", "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"}


class NetworkBlocked(ConnectionRefusedError):
    """Raised instead of reaching another machine. A ConnectionRefusedError, so libraries treat it as being offline."""


def _is_here(address: object) -> bool:
    """True for a host, or (host, port), on the loopback interface; for None; and for kinds of address that are no host at all."""
    host = address[0] if isinstance(address, tuple) and address else address
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str) or host.lower() in HERE:
        return True
    from ipaddress import IPv6Address, ip_address

    try:
        number = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(number, IPv6Address) and number.ipv4_mapped:
        return number.ipv4_mapped.is_loopback
    return number.is_loopback or number.is_unspecified


def _refuse_beyond(call: str, address: object) -> None:
    if not _is_here(address):
        raise NetworkBlocked(
            f"{call}({address!r}) was blocked: quick scale and the tests need no network. "
            "What must be fetched belongs into the installation, or behind scale='standard'."
        )


def _watch(event: str, arguments: tuple) -> None:
    place = WATCHED.get(event)
    if place is None:
        return
    if place and getattr(arguments[0], "family", None) == UNIX:  # its address is a path
        return
    _refuse_beyond(event, arguments[place])


def _look_before_connecting(name: str) -> None:
    """A host's name given to connect is looked up before the audit hook hears of the call: look at it earlier."""
    below = getattr(socket.socket, name)

    def call(self: socket.socket, *arguments: object) -> object:
        if self.family != UNIX and isinstance(arguments[-1], tuple):
            _refuse_beyond(f"socket.{name}", arguments[-1])
        return below(self, *arguments)

    setattr(socket.socket, name, call)


def _run_the_next_one() -> None:
    """A distribution may have a sitecustomize of its own; this file stands before it on the path, so it is run from here."""
    import os
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    own = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != own])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


sys.addaudithook(_watch)
for _name in ("connect", "connect_ex", "sendto"):
    _look_before_connecting(_name)
_run_the_next_one()
