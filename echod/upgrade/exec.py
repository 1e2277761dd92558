"""How the program that is installed now is started in place of this one."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from msgspec import Struct

from echod.upgrade import state_file


def command_line(
    original: Sequence[str], arguments: Sequence[str], interpreter: str, directory: str
) -> tuple[str, ...]:
    """Return the command, without `arguments`, that starts what is installed now as this program was started.

    `original` is sys.orig_argv. A script is run by itself, because its first line names the interpreter that it is
    installed for. A module is not searched for in the current directory, which could hold anything.
    """
    head = original[: len(original) - len(arguments)]
    script = os.path.join(directory, head[-1])
    if head[-2:-1] == ["-m"] or not os.path.isfile(script):
        flags = [flag for flag in head[1:-2] if flag != "-P"]  # the previous upgrade added it
        return (interpreter, *flags, "-P", "-m", "echod")
    is_by_itself = len(head) == 2 and os.access(script, os.X_OK)
    return (script,) if is_by_itself else (interpreter, *head[1:-1], script)


class NextProgram(Struct, frozen=True, kw_only=True):
    """The program that may replace this one in the same process."""

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    execve: Callable[..., object]
    """os.execve."""

    @property
    def preflight(self) -> tuple[str, ...]:
        """The command that shows whether the program could take over."""
        return (*self.command, "preflight", *self.arguments)

    def environment_with(self, state: int) -> dict[str, str]:
        """Return the environment for a program that is to read the state from this descriptor."""
        return {**self.environment, state_file.VARIABLE: str(state)}

    def execute(self, state: int, descriptors: Collection[int]) -> None:
        """Replace this program; the next one inherits the state and the descriptors. Raises OSError."""
        with _inheritable({state, *descriptors}):
            self.execve(self.command[0], (*self.command, *self.arguments), self.environment_with(state))


@contextmanager
def _inheritable(descriptors: Collection[int]) -> Iterator[None]:
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        yield
    finally:
        for descriptor in descriptors:
            with suppress(OSError):
                os.set_inheritable(descriptor, False)
