"""The rate of new connections from one address, in bounded memory however many addresses there are."""

from echod.net.access import pack

MOST_ADDRESSES = 16_384
"""How many addresses are remembered, in about 3 MB. An address is forgotten one second after its last connection. If
more addresses than this connect within a second, those that connected longest ago are forgotten early."""


class RateLimit:
    """Admits `rate` connections per second from one address, in bursts of at most one second's worth.

    It is a leaky bucket, kept as one number per address: the time when the bucket will be empty again (GCRA, ITU-T
    I.371). An IPv6 address counts by its /64, because whoever has one address usually has the whole network.
    """

    def __init__(self) -> None:
        self._empty_at: dict[bytes, float] = {}  # in the order of the last connection

    def __len__(self) -> int:
        return len(self._empty_at)

    def admits(self, host: str, rate: int, now: float) -> bool:
        """Count a connection from this address at `now` (monotonic seconds); whether it is within `rate` per second."""
        packed = pack(host)
        if packed is None:
            return True
        network = packed[:8]  # all four bytes of an IPv4 address
        empty_at = max(now, self._empty_at.pop(network, now)) + 1 / rate
        is_admitted = empty_at <= now + 1 + 1e-9
        self._empty_at[network] = empty_at if is_admitted else empty_at - 1 / rate
        if len(self._empty_at) > MOST_ADDRESSES:
            del self._empty_at[next(iter(self._empty_at))]
        return is_admitted

    def forget_idle(self, now: float) -> None:
        """Forget the addresses whose bucket is empty; call it periodically."""
        while self._empty_at and self._empty_at[address := next(iter(self._empty_at))] <= now:
            del self._empty_at[address]
