"""Upgrades, one after the other: the next program proves itself, then this one is replaced by it, or goes on.

Requests that come while one is under way become one more. How a program proves itself, what must come to rest first and
how it is replaced is handed in; nothing of it has changed anything until the replacement, which doesn't return.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
from msgspec import Struct

from echod.upgrade.preflight import PreflightError

SETTLE_S = 5.0
"""How long what is under way may keep an upgrade waiting: a reload, a listener that is to be closed."""

log = structlog.get_logger()


class Replace(Protocol):
    """Replace the program, without a turn of the event loop; raises OSError if that can't be."""

    def __call__(self, *, is_wanted_again: bool) -> None:
        """Let the next program upgrade once more if that is wanted."""


class Steps(Struct, frozen=True):
    """What an upgrade consists of."""

    prove: Callable[[], Awaitable[str]]
    """Let the next program prove itself; returns what it says of itself, raises PreflightError."""
    settle: Callable[[], Awaitable[None]]
    """Bring to rest what can't cross; undone by `go_on`."""
    go_on: Callable[[], None]
    replace: Replace


class Upgrader:
    """Owns the upgrade under way."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._wanted = asyncio.Event()
        self._is_under_way = False
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="upgrades")

    def request(self) -> None:
        """Upgrade, soon: after the one under way, if one is."""
        self._wanted.set()

    async def close(self) -> None:
        """Upgrade no more; one that is under way is given up."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        if self._is_under_way or self._wanted.is_set():
            _refuse("draining")

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            self._is_under_way = True
            try:
                await self._upgrade()
            except PreflightError as error:
                _refuse(*error.errors)
            except TimeoutError:
                _refuse(f"a reload or a listener that is to be closed doesn't come to its end within {SETTLE_S:g} s")
            except OSError as error:
                _refuse(f"{error.filename or 'execve'}: {(error.strerror or str(error)).lower()}")
            except Exception as error:  # whatever it is, this program serves on
                log.exception("upgrade failed")
                _refuse(repr(error))
            self._is_under_way = False

    async def _upgrade(self) -> None:
        log.info("upgrade proven", by=await self._steps.prove())
        try:
            async with asyncio.timeout(SETTLE_S):
                await self._steps.settle()
            self._steps.replace(is_wanted_again=self._wanted.is_set())
        finally:
            self._steps.go_on()


def _refuse(*errors: str) -> None:
    log.error("upgrade refused", errors=[*errors])
