"""The bare uvloop protocol: upper-cases lines, and does nothing else that echod does.

python bare.py PORT
"""

import asyncio
import sys
from typing import cast

import uvloop


class Upper(asyncio.Protocol):
    """Answer the complete lines of each chunk with one write."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast("asyncio.Transport", transport)
        self.unfinished = b""

    def data_received(self, data: bytes) -> None:
        """Answer."""
        if self.unfinished:
            data = self.unfinished + data
        end = data.rfind(b"\n") + 1
        self.unfinished = data[end:]
        if end:
            self.transport.write("\n".join(map(str.strip, data[:end].decode().split("\n"))).upper().encode())


async def main(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(Upper, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
