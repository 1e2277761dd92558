"""The rate of new connections from one address, in bounded memory however many addresses there are."""

from echod.net.access import pack

MOST_ADDRESSES = 16_384
"""How many addresses are remembered, in about 3 MB. If more of them connect within two seconds, those that connected
longest ago are forgotten early."""

BURST_S = 1.0
"""How many seconds' worth of connections are admitted at once. After that time without one, an address is as new."""


class RateLimit:
    """Admits `rate` connections per second from one address, in bursts of at most one second's worth.

    It is a leaky bucket, kept as one number per address: the time when the bucket will be empty again (GCRA, ITU-T
    I.371). An IPv6 address counts by its /64, because a client with one address usually has the network.
    """

    def __init__(self) -> None:
        # Two generations, so that forgetting takes no search for the oldest address.
        self._recent: dict[bytes, float] = {}
        self._older: dict[bytes, float] = {}
        self._recent_since = 0.0

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def admits(self, host: str, rate: int, now: float) -> bool:
        """Count a connection from this address at `now` (monotonic seconds); whether it is within `rate` per second."""
        packed = pack(host)
        if packed is None:
            return True
        network = packed[:8]  # all four bytes of an IPv4 address
        empty_at = max(now, self._older.pop(network, now), self._recent.get(network, now))
        is_admitted = empty_at + 1 / rate <= now + BURST_S + 1e-9
        self._recent[network] = empty_at + 1 / rate if is_admitted else empty_at
        if len(self._recent) >= MOST_ADDRESSES // 2:
            self._begin_generation(now)
        return is_admitted

    def forget_idle(self, now: float) -> None:
        """Forget addresses whose bucket is empty, a few seconds after their last connection; call it periodically."""
        if now - self._recent_since >= BURST_S:
            self._begin_generation(now)

    def _begin_generation(self, now: float) -> None:
        self._older, self._recent, self._recent_since = self._recent, {}, now
