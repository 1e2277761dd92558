"""Questions to a running echod through its admin endpoint: blocking, one at a time, for the commands that ask them."""

import json
import socket
from collections.abc import Sequence
from contextlib import closing
from http.client import BadStatusLine, HTTPConnection, HTTPException, RemoteDisconnected
from typing import Any

from echod.net.address import Address, SystemdAddress, TcpAddress, UnixAddress, parse_address

STATS_S = 10.0
"""How long an answer may take that a loop which turns gives at once."""

RELOAD_S = 60.0
"""How long a verdict may take: name servers and disks can be slow; systemd gives a reload 90 s."""

ANSWER_BYTES = 1 << 20


class UnansweredError(Exception):
    """Why there is no answer, and what to do about it."""


class RefusedError(Exception):
    """Every fault for which a reload was refused."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = tuple(errors)


class _NobodyThereError(Exception):
    """Nobody listens there."""


def candidates(configured: str, runtime: str | None, *, for_reload: bool) -> list[Address]:
    """Where an echod may answer that is told `configured` and has `runtime`; over TCP it would take no reload."""
    try:
        addresses = [parse_address(text) for text in (configured, runtime) if text]
    except ValueError as error:
        raise UnansweredError(f"$RUNTIME_DIRECTORY: {runtime}: {error}") from error
    local: list[Address] = [address for address in addresses if isinstance(address, UnixAddress)]
    return local if for_reload and local else addresses


def stats(addresses: Sequence[Address], answer_s: float = STATS_S) -> dict[str, Any]:
    """The statistics of the echod at the first address where somebody listens. Raises UnansweredError."""
    match _ask(addresses, "GET", "/stats", answer_s):
        case _, 200, dict(found):
            return found
        case address, status, answer:
            raise _strange(address, status, answer)


def reload(addresses: Sequence[Address]) -> tuple[list[str], list[str]]:
    """Have it reload; the keys that changed, and those that need a restart. Raises RefusedError, UnansweredError."""
    match _ask(addresses, "POST", "/reload", RELOAD_S):
        case _, 200, {"changed": list(changed), "restart_needed": list(waiting)}:
            return [*map(str, changed)], [*map(str, waiting)]
        case _, 409, {"errors": list(errors)}:
            raise RefusedError([str(message) for message in errors])
        case address, status, answer:
            raise _strange(address, status, answer)


def _ask(addresses: Sequence[Address], method: str, path: str, answer_s: float) -> tuple[Address, int, Any]:
    if not addresses:
        raise UnansweredError("no admin endpoint is known: name it by --admin ADDRESS, or by -c FILE the file it is in")
    for address in addresses:
        try:
            return address, *_ask_one(address, method, path, answer_s)
        except _NobodyThereError:
            pass
    asked = " and ".join(map(str, addresses))
    raise UnansweredError(
        f"nobody answers at {asked}: is echod running? --admin ADDRESS asks elsewhere{_hint(addresses)}"
    )


def _hint(addresses: Sequence[Address]) -> str:
    has_any_port = any(isinstance(address, TcpAddress) and address.port == 0 for address in addresses)
    return "; which free port it took for 0, its log tells: `admin endpoint`" if has_any_port else ""


def _ask_one(address: Address, method: str, path: str, answer_s: float) -> tuple[int, Any]:
    with closing(_connection(address, answer_s)) as connection:
        try:
            connection.connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise _NobodyThereError from error
        except PermissionError as error:
            raise UnansweredError(f"{address}: permission denied: only its user and root may ask; try sudo") from error
        except OSError as error:
            raise UnansweredError(f"{address}: {(error.strerror or str(error)).lower()}") from error
        try:
            connection.request(method, path, headers={"Content-Length": "0"} if method == "POST" else {})
            response = connection.getresponse()
            return response.status, _content(response.read(ANSWER_BYTES), response.headers.get_content_type())
        except TimeoutError as error:
            raise UnansweredError(
                f"{address}: no answer within {answer_s:.0f} s: its log tells what it is busy with"
            ) from error
        except RemoteDisconnected as error:  # which is a BadStatusLine too
            raise UnansweredError(f"{address}: no admin endpoint of echod: closed without an answer") from error
        except BadStatusLine as error:
            if str(error).startswith(f"{method} {path} ".upper()):  # the request itself, echoed in upper case
                raise UnansweredError(
                    f"{address}: echod serves clients there; its admin endpoint is where admin.listen says"
                ) from error
            raise UnansweredError(f"{address}: no admin endpoint of echod: the answer is not HTTP") from error
        except (HTTPException, OSError, ValueError, RecursionError) as error:
            raise UnansweredError(f"{address}: no admin endpoint of echod: {_words(error)}") from error


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return "the answer is not HTTP" if isinstance(error, HTTPException) else "the answer is not JSON"


def _content(body: bytes, kind: str) -> Any:
    return json.loads(body) if kind == "application/json" else body.decode(errors="backslashreplace").strip()


def _strange(address: Address, status: int, answer: Any) -> UnansweredError:
    is_ours = isinstance(answer, str) and answer.isprintable() and len(answer) < 200
    words = answer if is_ours else "no admin endpoint of echod"
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
            raise UnansweredError(f"{address}: only the process that was handed the socket knows where that is")
