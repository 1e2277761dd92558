"""What crosses an execve(2): the state of the process, in a format of its own that has a version.

One file in memory (memfd_create(2)): a line with the version, then documents of MessagePack, each behind its length:
the process, the service, and each client with its raw bytes. Fields have names, so a reader leaves out what it doesn't
know and takes the default for what is missing; a change that can't be read so raises VERSION. Times are of
CLOCK_MONOTONIC, which an execve doesn't stop. The event loop and the server are not known here.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from echod.net.sockets import DEFAULT_SETTINGS, ListenerSettings
from echod.server.state import ConnectionState, SavedAddress

VERSION = 1

READABLE = (1,)
"""The versions that this program understands."""

VARIABLE = "ECHOD_HANDOVER"
"""In the environment: the descriptor of the state."""

_HEAD = b"echod state %d\n"
_LENGTH_BYTES = 8
_FIRST_DESCRIPTOR = 3  # behind the standard streams
_LAST_DESCRIPTOR = 2**31 - 1
_BATCH_BYTES = 1 << 20


class HandoverError(Exception):
    """Why a state can't be taken over."""


class Listening(Struct, kw_only=True, omit_defaults=True):
    """A listening socket, and which one of its address it is."""

    descriptor: int
    family: int
    address: SavedAddress
    number: int = 0
    settings: ListenerSettings = DEFAULT_SETTINGS
    file: tuple[int, int] | None = None
    """Device and inode of a Unix socket's file, if it is ours to remove."""
    is_inherited: bool = False


class Process(Struct, kw_only=True, omit_defaults=True):
    """What belongs to the process, whatever it serves."""

    pid: int
    version: str
    """Of the program that wrote it."""
    left_at: float
    """When clients were left, to be served by the next program."""
    directory: str = ""
    """Where it was started: relative paths are meant from there."""
    inherited: list[tuple[str, int]] = []
    """Sockets of a service manager: name and descriptor."""
    pidfile: tuple[str, int] | None = None
    """Path, and the descriptor that holds the lock."""
    orders: list[tuple[str, int]] = []
    """Signals that were not followed yet, and who sent them."""
    log_dropped: int = 0


class Service(Struct, kw_only=True, omit_defaults=True):
    """What clients are served with."""

    listeners: list[Listening] = []
    admin: list[Listening] = []
    config: dict[str, Any] = {}
    """The configuration in force."""
    stats: dict[str, Any] = {}
    ourselves: list[SavedAddress] = []
    """Clients under way that are our own."""


class State(Struct):
    """Everything but the clients."""

    process: Process
    service: Service

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that the next program takes over, except those of clients."""
        listeners = [each.descriptor for each in (*self.service.listeners, *self.service.admin)]
        inherited = [descriptor for _, descriptor in self.process.inherited]
        return listeners + inherited + ([self.process.pidfile[1]] if self.process.pidfile else [])


# -- writing -----------------------------------------------------------------------------------------------------------


def save(state: State, clients: Iterable[ConnectionState] = ()) -> int:
    """The descriptor of a file in memory that holds it all, to be read by `received`; raises OSError."""
    descriptor = os.memfd_create("echod state")
    try:
        batch, size = [_HEAD % VERSION], 0
        for document in (state.process, state.service, *clients):
            encoded = msgspec.msgpack.encode(document)
            batch += [len(encoded).to_bytes(_LENGTH_BYTES, "big"), encoded]
            size += len(encoded)
            if size >= _BATCH_BYTES:
                _write(descriptor, b"".join(batch))
                batch, size = [], 0
        _write(descriptor, b"".join(batch))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# -- reading -----------------------------------------------------------------------------------------------------------


def received(environment: Mapping[str, str], pid: int) -> "tuple[State, Iterator[ConnectionState]] | None":
    """The state that the program before us in this process has left, and its clients one by one; None if there is none.

    Raises HandoverError. The caller removes VARIABLE from the environment, which isn't meant for its children.
    """
    said = environment.get(VARIABLE, "")
    if not said:
        return None
    try:
        with open(_descriptor(said), "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise HandoverError(f"{VARIABLE}: no state there (got {said!r})") from error
    state, clients = read(content)
    if state.process.pid != pid:
        raise HandoverError(f"{VARIABLE}: the state of another process, {state.process.pid}")
    return state, clients


def _descriptor(said: str) -> int:
    descriptor = int(said)
    if not _FIRST_DESCRIPTOR <= descriptor <= _LAST_DESCRIPTOR:
        raise ValueError(said)
    return descriptor


def read(content: "mmap.mmap | bytes") -> tuple[State, Iterator[ConnectionState]]:
    """What a file of states holds; raises HandoverError if this program doesn't understand it."""
    head, newline, _ = content[:64].partition(b"\n")
    version = head.removeprefix(b"echod state ")
    if not newline or version == head or not version.isdigit():
        raise HandoverError("no state of echod")
    if int(version) not in READABLE:
        understood = ", ".join(map(str, READABLE))
        raise HandoverError(f"a state of version {int(version)}, which echod doesn't know ({understood})")
    documents = _documents(content, len(head) + 1)
    try:
        process = msgspec.msgpack.decode(next(documents), type=Process)
        service = msgspec.msgpack.decode(next(documents), type=Service)
    except (StopIteration, msgspec.DecodeError) as error:
        raise HandoverError(f"a broken state: {error or 'cut short'}") from error
    return State(process, service), (msgspec.msgpack.decode(each, type=ConnectionState) for each in documents)


def _documents(content: "mmap.mmap | bytes", start: int) -> Iterator[bytes]:
    while start < len(content):
        end = start + _LENGTH_BYTES
        length = int.from_bytes(content[start:end], "big")
        yield content[end : end + length]
        start = end + length
