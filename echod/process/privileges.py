"""Drop the privileges of root for good, after everything that needs them.

This module looks up the user, opens files for it as root, and makes sure that root cannot be regained.
"""

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct


class PrivilegeError(Exception):
    """The privileges cannot be dropped as asked."""


class Identity(Struct, frozen=True):
    """The user and the groups that a process runs as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    only_group: str = ""
    """The group as given on the command line, if only the group is to change."""

    def __str__(self) -> str:
        return f"group {self.only_group}" if self.only_group else f"user {self.name}"


def find(user: str | None, group: str | None) -> Identity | None:
    """Look up a user and a group by name or number; return None if the process already runs as them.

    Raise PrivilegeError if they do not exist.
    """
    if user is None and group is None:
        return None
    uid, entry = (os.getuid(), _entry_of(os.getuid())) if user is None else _user(user)
    if group is not None:
        gid = _group(group)
    elif entry:
        gid = entry.pw_gid
    else:
        raise PrivilegeError(f"--user: this number has no account and so no group: add --group (got {user!r})")
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
    return (
        text.isascii() and text.isdigit() and int(text) < 2**32 - 1
    )  # the last number means "unchanged", setresuid(2)


def drop(identity: Identity, give: Callable[[int, int], object]) -> None:
    """Become that user in every thread, irreversibly; raise PrivilegeError if that fails.

    Before that, `give` is called with the uid and the gid, to change the owner of what the user needs.
    """
    try:
        give(identity.uid, identity.gid)
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise _refused(identity, error) from error
    if identity.uid != 0 and (_is_allowed(lambda: os.seteuid(0)) or _is_allowed(lambda: os.setgroups([0]))):
        raise PrivilegeError(
            f"--user: {identity.name} could regain the privileges of root: choose a user without capabilities"
        )


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
    advice = "; start as root" if error.errno == errno.EPERM else ""
    return PrivilegeError(f"{asked}: {words}{advice}")


# -- files that root opens for the user --------------------------------------------------------------------------------


def open_for(identity: Identity, open_file: Callable[[int], int]) -> int:
    """Open a file so that the user can open it again later; `open_file` takes additional flags for open(2).

    The file is opened as the user if possible. A file that only root can open must belong to root, and is given to the
    user; anything else, such as a link that someone planted, is refused. Raise OSError or PrivilegeError.
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
