"""Requests to the admin endpoint of a running echod, with blocking sockets, for `echod stats` and `echod reload`."""

import json
import socket
from collections.abc import Sequence
from contextlib import closing
from http.client import BadStatusLine, HTTPConnection, HTTPException, RemoteDisconnected
from typing import Any

from echod.net.address import Address, SystemdAddress, TcpAddress, UnixAddress, parse_address

STATS_S = 10.0
"""How long to wait for the statistics, which a healthy event loop sends at once."""

RELOAD_S = 60.0
"""How long to wait for the result of a reload: name servers and disks can be slow; systemd allows 90 s."""

ANSWER_BYTES = 1 << 20


class UnansweredError(Exception):
    """There is no usable answer; the message says why and what to do."""


class RefusedError(Exception):
    """The reload was refused, with every error."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


class _NobodyThereError(Exception):
    """Nobody listens at an address."""


def candidates(configured: str, runtime: str | None, *, for_reload: bool) -> list[Address]:
    """Return the addresses to try, from the configured one and that in the runtime directory.

    For a reload, prefer Unix sockets, because echod refuses one over TCP.
    """
    try:
        addresses = [parse_address(text) for text in (configured, runtime) if text]
    except ValueError as error:
        raise UnansweredError(f"$RUNTIME_DIRECTORY: {runtime}: {error}") from error
    local: list[Address] = [address for address in addresses if isinstance(address, UnixAddress)]
    return local if for_reload and local else addresses


def stats(addresses: Sequence[Address], answer_s: float = STATS_S) -> dict[str, Any]:
    """Return the statistics from the first address where somebody listens; raise UnansweredError."""
    match _ask(addresses, "GET", "/stats", answer_s):
        case _, 200, dict(found):
            return found
        case address, status, answer:
            raise _unexpected(address, status, answer)


def reload(addresses: Sequence[Address]) -> tuple[list[str], list[str]]:
    """Request a reload; return the keys that changed, and those that need a restart.

    Raise RefusedError or UnansweredError.
    """
    match _ask(addresses, "POST", "/reload", RELOAD_S):
        case _, 200, {"changed": list(changed), "restart_needed": list(waiting)}:
            return [*map(str, changed)], [*map(str, waiting)]
        case _, 409, {"errors": list(errors)}:
            raise RefusedError([str(message) for message in errors])
        case address, status, answer:
            raise _unexpected(address, status, answer)


def _ask(addresses: Sequence[Address], method: str, path: str, answer_s: float) -> tuple[Address, int, Any]:
    if not addresses:
        raise UnansweredError(
            "no admin endpoint is known: name it with --admin ADDRESS, or its configuration with -c FILE"
        )
    for address in addresses:
        try:
            return address, *_ask_one(address, method, path, answer_s)
        except _NobodyThereError:
            pass
    asked = " and ".join(map(str, addresses))
    raise UnansweredError(
        f"nobody answers at {asked}: is echod running? If elsewhere, use --admin ADDRESS{_hint(addresses)}"
    )


def _hint(addresses: Sequence[Address]) -> str:
    has_any_port = any(isinstance(address, TcpAddress) and address.port == 0 for address in addresses)
    return "; for port 0, the event `admin endpoint` in its log names the free port" if has_any_port else ""


def _ask_one(address: Address, method: str, path: str, answer_s: float) -> tuple[int, Any]:
    with closing(_connection(address, answer_s)) as connection:
        try:
            connection.connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise _NobodyThereError from error
        except PermissionError as error:
            raise UnansweredError(
                f"{address}: permission denied: only the daemon's user and root may connect; try sudo"
            ) from error
        except OSError as error:
            raise UnansweredError(f"{address}: {(error.strerror or str(error)).lower()}") from error
        try:
            connection.request(method, path, headers={"Content-Length": "0"} if method == "POST" else {})
            response = connection.getresponse()
            return response.status, _content(response.read(ANSWER_BYTES), response.headers.get_content_type())
        except TimeoutError as error:
            raise UnansweredError(f"{address}: no answer within {answer_s:.0f} s: see its log") from error
        except RemoteDisconnected as error:  # which is a BadStatusLine too
            raise UnansweredError(f"{address}: not an admin endpoint of echod: closed without an answer") from error
        except BadStatusLine as error:
            if str(error).startswith(f"{method} {path} ".upper()):  # the request itself, echoed in upper case
                raise UnansweredError(
                    f"{address}: echod serves clients at this address; use that of admin.listen"
                ) from error
            raise UnansweredError(f"{address}: not an admin endpoint of echod: the answer is not HTTP") from error
        except (HTTPException, OSError, ValueError, RecursionError) as error:
            raise UnansweredError(f"{address}: not an admin endpoint of echod: {_words(error)}") from error


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return "the answer is not HTTP" if isinstance(error, HTTPException) else "the answer is not JSON"


def _content(body: bytes, kind: str) -> Any:
    return json.loads(body) if kind == "application/json" else body.decode(errors="backslashreplace").strip()


def _unexpected(address: Address, status: int, answer: Any) -> UnansweredError:
    is_ours = isinstance(answer, str) and answer.isprintable() and len(answer) < 200
    words = answer if is_ours else "not an admin endpoint of echod"
    return UnansweredError(f"{address}: {words} (status {status})")


class _UnixConnection(HTTPConnection):
    """HTTP through a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: Address, timeout_s: float) -> HTTPConnection:
    match address:
        case UnixAddress(path):
            return _UnixConnection(path, timeout_s)
        case TcpAddress(host, port):
            return HTTPConnection(host, port, timeout=timeout_s)
        case SystemdAddress():
            raise UnansweredError(f"{address}: only the process that inherited the socket knows its address")
