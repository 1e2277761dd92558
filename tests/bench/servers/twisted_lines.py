"""Twisted's own line protocol, on the reactor that it chooses for this platform.

python twisted_lines.py PORT
"""

import sys

from twisted.internet import protocol, reactor
from twisted.protocols.basic import LineOnlyReceiver


class Upper(LineOnlyReceiver):  # type: ignore[misc] # it may not be there to be looked at
    """Answers line by line."""

    delimiter = b"\n"
    MAX_LENGTH = 65536

    def connectionMade(self) -> None:  # noqa: N802 (Twisted's name)
        """Send small replies at once, as every other server here does."""
        self.transport.setTcpNoDelay(True)

    def lineReceived(self, line: bytes) -> None:  # noqa: N802 (Twisted's name)
        """Answer."""
        self.sendLine(line.decode().strip().upper().encode())


reactor.listenTCP(int(sys.argv[1]), protocol.Factory.forProtocol(Upper), interface="127.0.0.1", backlog=4096)
reactor.run()
