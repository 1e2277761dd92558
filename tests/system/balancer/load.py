"""Clients that connect at a fixed rate, every second one silent at first, in a separate process.

Run as a module, it continues until its standard input ends, and then prints the results as JSON. The rate does not
depend on the results of earlier clients.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.daemon import DEADLINE_S, UNMEASURED, clean_environment

CLIENTS_PER_S = 120
SILENT_S = 0.7
WRONG = "wrong reply"


@dataclass
class Load:
    """The results of the clients."""

    served: int = 0
    silent: int = 0
    """How many of the served clients were silent at first."""
    slowest_ms: float = 0.0
    """Time from sending the line to the reply, in seconds."""
    failed: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    def failures(self) -> int:
        return sum(self.failed.values())


async def visit(port: int, number: int, load: Load) -> None:
    """Connect, perhaps pause, send a line, and read the reply and the end of the stream."""
    silent_s = SILENT_S if number % 2 else 0.0
    kind = "silent first" if silent_s else "at once"
    writer = None
    try:
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(silent_s)
            began = time.monotonic()
            writer.write(b"line %d\n" % number)
            reply = await reader.readline()
            took_s = time.monotonic() - began
            writer.write_eof()
            rest = await reader.read()
    except OSError as error:
        load.failed[f"{kind}: {type(error).__name__}"] += 1
    else:
        if (reply, rest) == (b"LINE %d\n" % number, b""):
            load.served += 1
            load.silent += bool(silent_s)
            load.slowest_ms = max(load.slowest_ms, round(1000 * took_s, 1))
        else:
            load.failed[f"{kind}: {WRONG if reply else 'no reply'}"] += 1
    finally:
        if writer:
            writer.close()


async def come(port: int, load: Load, per_s: int) -> None:
    """Start clients until the end; then wait for those that are connected."""
    began = time.monotonic()
    number = 0
    async with asyncio.TaskGroup() as clients:
        while not load.is_over:
            clients.create_task(visit(port, number, load))
            number += 1
            await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))


async def main(port: int, per_s: int) -> None:
    load = Load()
    coming = asyncio.create_task(come(port, load, per_s))
    await asyncio.to_thread(sys.stdin.read)
    load.is_over = True
    await coming
    sys.stdout.write(json.dumps(vars(load)))


@contextlib.contextmanager
def coming(port: int, per_s: int = CLIENTS_PER_S) -> Iterator[Load]:
    """Run so many clients per second during the `with`; the results are complete after it."""
    load = Load()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.system.balancer.load", str(port), str(per_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment() | UNMEASURED,
    ) as process:
        try:
            yield load
            figures = json.loads(process.communicate(timeout=2 * DEADLINE_S)[0])
        finally:
            process.kill()
    vars(load).update(figures | {"failed": Counter(figures["failed"])})


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
