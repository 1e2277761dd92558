"""The state that one program hands to the next in a live upgrade, in a versioned file format.

It is a file in memory (memfd_create(2)) that survives execve(2): a line with the version, then MessagePack documents,
each after its length of 8 bytes: the process, the service, and every client. Fields have names: a reader ignores those
that it does not know, and uses the default for those that are missing. A change that cannot be read like that raises
VERSION. Times are of CLOCK_MONOTONIC, which execve does not change.
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
"""The environment variable that holds the descriptor of the state."""

_HEAD = b"echod state %d\n"
_LENGTH_BYTES = 8
_FIRST_DESCRIPTOR = 3  # after the standard streams
_LAST_DESCRIPTOR = 2**31 - 1
_BATCH_BYTES = 1 << 20


class HandoverError(Exception):
    """Why a state cannot be taken over."""


class ListenerState(Struct, kw_only=True, omit_defaults=True):
    """A listening socket."""

    descriptor: int
    family: int
    address: SavedAddress
    number: int = 0
    """Tells listeners of the same address apart."""
    settings: ListenerSettings = DEFAULT_SETTINGS
    file: tuple[int, int] | None = None
    """Device and inode of a Unix socket's file, if it is ours to remove."""
    is_inherited: bool = False
    """Whether a service manager holds it too."""


class ProcessState(Struct, kw_only=True, omit_defaults=True):
    """The state of the process that does not depend on what it serves."""

    pid: int
    version: str
    """The version of the program that wrote the state."""
    stopped_at: float
    """When that program stopped serving."""
    directory: str = ""
    """The directory that relative paths refer to."""
    inherited: list[tuple[str, int]] = []
    """The sockets of a service manager: name and descriptor."""
    pidfile: tuple[str, int] | None = None
    """The path, and the descriptor that holds the lock."""
    signals: list[tuple[str, int]] = []
    """The signals that were not handled yet: name without SIG, and the sender's pid."""
    log_dropped: int = 0


class ServiceState(Struct, kw_only=True, omit_defaults=True):
    """The state of the service, except its clients."""

    listeners: list[ListenerState] = []
    admin_listeners: list[ListenerState] = []
    config: dict[str, Any] = {}
    """The configuration in force."""
    stats: dict[str, Any] = {}
    self_probes: list[SavedAddress] = []
    """The client addresses of our own self-probes that are not accepted yet."""


class State(Struct):
    """Everything except the clients."""

    process: ProcessState
    service: ServiceState

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that the next program takes over, except those of clients."""
        listeners = [each.descriptor for each in (*self.service.listeners, *self.service.admin_listeners)]
        inherited = [descriptor for _, descriptor in self.process.inherited]
        return listeners + inherited + ([self.process.pidfile[1]] if self.process.pidfile else [])


# -- writing -----------------------------------------------------------------------------------------------------------


def save(state: State, clients: Iterable[ConnectionState] = ()) -> int:
    """Write a file in memory, to be read by `receive`, and return its descriptor; raises OSError."""
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


def receive(environment: Mapping[str, str], pid: int) -> "tuple[State, Iterator[ConnectionState]] | None":
    """Return the state that the process `pid` has left in VARIABLE, and its clients one by one; None if there is none.

    Raises HandoverError. The caller removes VARIABLE from the environment, because children must not see it.
    """
    value = environment.get(VARIABLE, "")
    if not value:
        return None
    try:
        with open(_descriptor(value), "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise HandoverError(f"{VARIABLE}: no state there (got {value!r})") from error
    state, clients = read(content)
    if state.process.pid != pid:
        raise HandoverError(f"{VARIABLE}: the state of another process, {state.process.pid}")
    return state, clients


def _descriptor(value: str) -> int:
    descriptor = int(value)
    if not _FIRST_DESCRIPTOR <= descriptor <= _LAST_DESCRIPTOR:
        raise ValueError(value)
    return descriptor


def read(content: "mmap.mmap | bytes") -> tuple[State, Iterator[ConnectionState]]:
    """Parse a state file; raises HandoverError if this program does not understand it."""
    head, newline, _ = content[:64].partition(b"\n")
    version = head.removeprefix(b"echod state ")
    if not newline or version == head or not version.isdigit():
        raise HandoverError("no state of echod")
    if int(version) not in READABLE:
        understood = ", ".join(map(str, READABLE))
        raise HandoverError(f"a state of version {int(version)}, which echod doesn't know ({understood})")
    documents = _documents(content, len(head) + 1)
    try:
        process = msgspec.msgpack.decode(next(documents), type=ProcessState)
        service = msgspec.msgpack.decode(next(documents), type=ServiceState)
    except (StopIteration, msgspec.DecodeError) as error:
        raise HandoverError(f"a broken state: {error or 'cut short'}") from error
    return State(process, service), (msgspec.msgpack.decode(each, type=ConnectionState) for each in documents)


def _documents(content: "mmap.mmap | bytes", start: int) -> Iterator[bytes]:
    while start < len(content):
        end = start + _LENGTH_BYTES
        length = int.from_bytes(content[start:end], "big")
        yield content[end : end + length]
        start = end + length
