"""A generation that is prepared in a thread: if nobody waits for it any more, nothing of it is left."""

import asyncio
import os
import threading
from functools import partial
from pathlib import Path

from echod.config import loader
from echod.config.sources import Setting
from echod.lifecycle import generation
from echod.lifecycle.generation import Generation
from echod.process.worker_thread import in_thread
from tests.support.daemon import DEADLINE_S


def _load(directory: Path) -> loader.Loaded:
    flags = [
        Setting("test", "listen", f"unix:{directory}/sock"),
        Setting("test", "log.file", f"{directory}/log"),
        Setting("test", "admin.listen", f"unix:{directory}/admin"),
    ]
    return loader.load(None, {}, flags, 20_000)


def test_a_generation_that_is_ready_after_a_stop_is_discarded(tmp_path: Path) -> None:
    """A stop during the preparation of a reload: its listeners, socket files and log are closed again."""
    may_go_on = threading.Event()
    descriptors = len(os.listdir("/proc/self/fd"))

    def slow() -> generation.Generation:
        may_go_on.wait(DEADLINE_S)
        return generation.prepare(partial(_load, tmp_path))

    async def scenario() -> None:
        preparing = asyncio.ensure_future(in_thread(slow, Generation.discard))
        await asyncio.sleep(0)
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        may_go_on.set()
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "worker")
        await asyncio.to_thread(thread.join)

    asyncio.run(scenario())
    assert not (tmp_path / "sock").exists()
    assert not (tmp_path / "admin").exists()
    assert (tmp_path / "log").exists(), "it was prepared"
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_generation_for_a_closed_loop_is_discarded(tmp_path: Path) -> None:
    """The event loop was closed during the preparation: the listeners and socket files are closed again."""
    may_go_on = threading.Event()

    def slow() -> generation.Generation:
        may_go_on.wait(DEADLINE_S)
        return generation.prepare(partial(_load, tmp_path))

    async def scenario() -> threading.Thread:
        preparing = asyncio.ensure_future(in_thread(slow, Generation.discard))
        await asyncio.sleep(0)
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "worker")
        return thread

    thread = asyncio.run(scenario())
    may_go_on.set()
    thread.join(DEADLINE_S)
    assert not (tmp_path / "sock").exists()
    assert not (tmp_path / "admin").exists()
