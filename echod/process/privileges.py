"""Become another user for good, once everything that only root may do is done.

Knows how a user is looked up, how root opens a file for him, and how the way back is barred.
"""

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct


class PrivilegeError(Exception):
    """Why privileges can't be dropped."""


class Identity(Struct, frozen=True):
    """Whose rights a process has: user, group, and every group."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    only_group: str = ""
    """The group as it was asked for, if the user is to stay the same."""

    def __str__(self) -> str:
        return f"group {self.only_group}" if self.only_group else f"user {self.name}"


def find(user: str | None, group: str | None) -> Identity | None:
    """The identity that names or numbers stand for, None if it is ours already; raises PrivilegeError."""
    if user is None and group is None:
        return None
    uid, entry = (os.getuid(), _entry_of(os.getuid())) if user is None else _user(user)
    if group is not None:
        gid = _group(group)
    elif entry:
        gid = entry.pw_gid
    else:
        raise PrivilegeError(f"--user: a number without a name has no group: name one with --group (got {user!r})")
    if os.getresuid() == (uid,) * 3 and os.getresgid() == (gid,) * 3:
        return None
    groups = os.getgrouplist(entry.pw_name, gid) if entry else [gid]
    only_group = group if user is None and group else ""
    return Identity(entry.pw_name if entry else str(uid), uid, gid, tuple(groups), only_group)


def _user(text: str) -> tuple[int, pwd.struct_passwd | None]:
    try:
        entry = pwd.getpwnam(text)
    except (KeyError, ValueError):
        if _is_number(text):
            return int(text), _entry_of(int(text))
        raise PrivilegeError(f"--user: no such user (got {text!r})") from None
    return entry.pw_uid, entry


def _entry_of(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def _group(text: str) -> int:
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        if _is_number(text):
            return int(text)
        raise PrivilegeError(f"--group: no such group (got {text!r})") from None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 2**32 - 1  # the last one means "leave it", setresuid(2)


def drop(identity: Identity, give: Callable[[int, int], object]) -> None:
    """Become that user in every thread, with no way back; raises PrivilegeError.

    `give`, while we are still root, makes what the user needs his own.
    """
    try:
        give(identity.uid, identity.gid)
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise _refused(identity, error) from error
    if identity.uid != 0 and (_is_allowed(lambda: os.seteuid(0)) or _is_allowed(lambda: os.setgroups([0]))):
        raise PrivilegeError(f"--user: as {identity.name} the privileges of root could be regained")


def _is_allowed(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _refused(identity: Identity, error: OSError) -> PrivilegeError:
    words = (error.strerror or str(error)).lower()
    asked = (
        f"--group: cannot take {identity}" if identity.only_group else f"--user, --group: cannot become {identity.name}"
    )
    return PrivilegeError(f"{asked}: {words}; only root can")


# -- what root opens for the user --------------------------------------------------------------------------------------


def open_for(identity: Identity, open_file: Callable[[int], int]) -> int:
    """A descriptor of a file that the user can open again later; `open_file` gets more flags for open(2).

    The user opens it himself if he can. What only root can open must be root's and becomes the user's; nothing in
    its place, such as a link that was left for root to follow, is ever given away. Raises OSError, PrivilegeError.
    """
    try:
        with _acting_as(identity):
            return open_file(0)
    except PermissionError as error:
        refused = PermissionError(error.errno, f"{error.strerror} for {identity}")
    try:
        descriptor = open_file(os.O_NOFOLLOW)
    except OSError:
        raise refused from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise refused
    os.fchown(descriptor, identity.uid, identity.gid)
    return descriptor


@contextmanager
def _acting_as(identity: Identity) -> Iterator[None]:
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    try:
        try:
            os.setgroups(identity.groups)
            os.setegid(identity.gid)
            os.seteuid(identity.uid)
        except OSError as error:
            raise _refused(identity, error) from error
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        if os.getgroups() != groups:
            os.setgroups(groups)
