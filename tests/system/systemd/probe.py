"""Print what a process may do as JSON: each attempt and its result, inside and outside of the sandbox."""

import ctypes
import json
import mmap
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

CLONE_NEWUSER = 0x10000000

libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write(directory: str) -> None:
    path = Path(directory, "echod-probe")
    path.write_text("written")
    path.unlink()


def _own_file(change: Callable[[Path], None]) -> None:
    """Change a file where the service may write."""
    path = Path(os.environ.get("RUNTIME_DIRECTORY", "/run"), "echod-probe")
    path.touch()
    try:
        change(path)
    finally:
        path.unlink()


def _open_socket(family: int, protocol: int) -> None:
    socket.socket(family, socket.SOCK_RAW, protocol).close()


WRITE_AND_EXECUTE = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC

ATTEMPTS: dict[str, Callable[[], object]] = {
    **{f"write to {directory}": partial(_write, directory) for directory in ("/etc", "/usr/local", "/var/lib", "/dev")},
    "write beside its own directory": lambda: _write("/run"),
    "list /root": lambda: os.listdir("/root"),
    "read /etc/shadow": lambda: Path("/etc/shadow").read_bytes(),
    "see process 1": lambda: Path("/proc/1/stat").read_bytes(),
    "become root": lambda: os.setresuid(0, 0, 0),
    "become another user": lambda: os.setresuid(1, 1, 1),
    "give a file to root": lambda: _own_file(lambda path: os.chown(path, 0, 0)),
    "make a set-user-id file": lambda: _own_file(lambda path: path.chmod(0o4755)),
    "make a user namespace": lambda: _call(libc.unshare(CLONE_NEWUSER)),
    "mount": lambda: _call(libc.mount(b"none", b"/mnt", b"tmpfs", 0, None)),
    "write to memory that is executable": lambda: mmap.mmap(-1, 4096, prot=WRITE_AND_EXECUTE).close(),
    "open a packet socket": lambda: _open_socket(socket.AF_PACKET, 0),
    "open a raw socket": lambda: _open_socket(socket.AF_INET, socket.IPPROTO_ICMP),
    "open a netlink socket": lambda: _open_socket(socket.AF_NETLINK, 0),
}


def outcome(attempt: Callable[[], object]) -> str:
    """Return `done` or the error of an attempt, made in a separate process, which may change user or namespace."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            attempt()
            os.write(writer, b"done")
        except Exception as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.wait()
    with open(reader) as result:
        return result.read()


if __name__ == "__main__":
    status = Path("/proc/self/status").read_text().splitlines()
    about = {
        line.partition(":")[0]: line.split()[1]
        for line in status
        if line.startswith(("Cap", "NoNew", "Seccomp:", "Uid"))
    }
    print(json.dumps({"attempts": {name: outcome(attempt) for name, attempt in ATTEMPTS.items()}, "status": about}))
