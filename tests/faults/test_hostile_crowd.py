"""Hostile clients: of one kind, in crowds, and all kinds at once, chosen by a seed."""

import asyncio
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from tests.faults.hostile import GONE_WITH_A_RESET, IP_MINTTL, Client, Crowd, Rules
from tests.faults.measurements import Figures, acquainted, closed_since, left_alone, scene
from tests.support.daemon import Daemon, ask, connect, read_to_end, serving, settings, settled
from tests.support.reference import INVALID, reference

LINE_BYTES = 65_536
HELD_BYTES = 240 * 1024
"""Memory that one client can make the daemon hold, according to the documentation."""


SLACK_MS = 250.0
"""Generous, because the crowds share the two cores: a blocked loop must still exceed it."""


@contextmanager
def _clients(port: int, count: int, **options: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as closing:
        yield [closing.enter_context(connect(port, **options)) for _ in range(count)]


# -- connections -------------------------------------------------------------------------------------------------------

FLOOD = 6000
FLOOD_LIMIT = 1000


@pytest.mark.timeout(120)
def test_a_flood_of_6_000_connections_is_served_or_rejected(report: Callable[[Figures], None]) -> None:
    """Of 6 000 connections at once a sixth is accepted and the rest rejected; none is reset or uncounted."""
    with serving(*settings(limits_connections=FLOOD_LIMIT)) as echod:
        before = acquainted(echod)
        with scene("6 000 connections at once", echod) as it:
            heard = Counter(asyncio.run(_flood(f"127.0.0.1:{echod.port}")))
        after = left_alone(echod, before)
        it.notes |= {"counted": after["connections"]["rejected"], "heard": dict(heard)}
        report(it.row())
        let_in = FLOOD_LIMIT - 1  # and the bystander
        assert heard == {b"ONE OF MANY\n": let_in, b"ERROR too many connections\n": FLOOD - let_in}
        assert after["connections"]["accepted"] == before["connections"]["accepted"] + let_in + 1
        assert after["connections"]["rejected"]["limit"] == FLOOD - let_in
        assert it.peak_descriptors < FLOOD_LIMIT + 1100, "the limit and those who are being told"
        assert it.grown_bytes < 40_000_000
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


async def _flood(address: str) -> list[bytes]:
    clients = [Client(random.Random(), Rules((), (), (), ())) for _ in range(FLOOD)]
    is_heard = [asyncio.ensure_future(_say_and_stay(client, address)) for client in clients]
    await asyncio.gather(*is_heard)
    await asyncio.gather(*(client.finish() for client in clients))
    assert {client.ending for client in clients} == {"eof"}
    for client in clients:
        await client.close()
    return [bytes(client.received) for client in clients]


async def _say_and_stay(client: Client, address: str) -> None:
    await client.connect(address)
    await client.send(b"one of many\n")
    client.listen()
    await client.hear(1)


RESETS = 10_000


@pytest.mark.timeout(120)
def test_10_000_clients_that_reset_at_once_are_counted_and_released(report: Callable[[Figures], None]) -> None:
    """Clients that reset before or after the accept, with a line or without, are all counted and released."""
    with serving() as echod:
        before = acquainted(echod)
        with scene("10 000 resets right after connect", echod) as it:
            for number in range(RESETS):
                with connect(echod.port) as client:
                    if number % 2:
                        client.send(b"a line nobody hears the reply to\n")
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, GONE_WITH_A_RESET)
        after = left_alone(echod, before)
        it.notes["counted"] = closed_since(before, after)
        report(it.row())
        assert closed_since(before, after) == {"reset": RESETS, "client": 1}
        assert it.grown_bytes < 20_000_000
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


# -- peers that are gone, or half so -----------------------------------------------------------------------------------

HALF_OPEN = 100
TIMEOUT_S = 2.0


@pytest.mark.timeout(120)
def test_half_open_connections_end_within_the_timeouts(report: Callable[[Figures], None]) -> None:
    """Peers that vanish in any state or stay after the half-close are closed for the right reason in time."""
    with serving(*settings(timeouts_idle=TIMEOUT_S, timeouts_line=TIMEOUT_S, timeouts_write=TIMEOUT_S)) as echod:
        before = acquainted(echod)
        with ExitStack() as peers:
            with scene(f"{6 * HALF_OPEN} half-open peers", echod) as it:
                for _ in range(HALF_OPEN):
                    for break_off in (_silence, _cut_in_line, _cut_while_owed, _deafen, _deafen_and_ask, _stay):
                        client = peers.enter_context(connect(echod.port, receive_buffer=8192))
                        assert ask(client, b"hello\n") == b"HELLO\n"
                        break_off(client)
                all_are_there = time.monotonic()
                settled(echod, 1)
                last_gone_after_s = time.monotonic() - all_are_there
            after = left_alone(echod, before)
        it.notes |= {"counted": closed_since(before, after), "last gone after s": round(last_gone_after_s, 2)}
        report(it.row())
        assert closed_since(before, after) == {
            "idle": 2 * HALF_OPEN,
            "line timeout": HALF_OPEN,
            "write timeout": 2 * HALF_OPEN,
            "invalid utf-8": HALF_OPEN,
            "client": 1,
        }
        assert last_gone_after_s < TIMEOUT_S + 1 + 3, "the timeout, the second of the half-close, and some air"
        assert it.grown_bytes < 6 * HALF_OPEN * HELD_BYTES
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


def _silence(client: socket.socket) -> None:
    """Cut the cable: from now on nothing arrives or is acknowledged."""
    client.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 255)


def _cut_in_line(client: socket.socket) -> None:
    _silence(client)
    client.sendall(b"half a line")


def _cut_while_owed(client: socket.socket) -> None:
    _silence(client)
    client.sendall(b"a line\n" * 100)


def _deafen(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_RD)


def _deafen_and_ask(client: socket.socket) -> None:
    _deafen(client)
    client.sendall(b"a line\n" * 5000)


def _stay(client: socket.socket) -> None:
    client.sendall(b"\xff\n")


LEAVING = 50


@pytest.mark.timeout(120)
def test_clients_that_close_with_pending_replies_leak_nothing(report: Callable[[Figures], None]) -> None:
    """Clients that close with pending replies are noticed without reading, and their memory is freed."""
    with serving(*settings(timeouts_write=60)) as echod:
        before = acquainted(echod)
        with scene(f"{LEAVING} clients that close while written to", echod) as it:
            with _clients(echod.port, LEAVING, receive_buffer=4096) as clients:
                _send_until_all_are_stuck(clients)
                held = echod.stats()["held_bytes"]
            settled(echod, 1)
        after = left_alone(echod, before)
        it.notes |= {"counted": closed_since(before, after), "held MB": round(held / 1e6, 1)}
        report(it.row())
        assert closed_since(before, after) == {"reset": LEAVING, "client": 1}
        assert 0 < held <= LEAVING * HELD_BYTES
        assert it.grown_bytes < 2 * LEAVING * HELD_BYTES
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


def _each_sends(clients: list[socket.socket], data: bytes) -> None:
    for client in clients:
        client.sendall(data)


def _send_until_all_are_stuck(clients: list[socket.socket]) -> None:
    """Pipeline without reading until no client can send more."""
    for client in clients:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)  # the kernel's memory for TCP is shared
    while taken := select.select([], clients, [], 0.5)[1]:
        for client in taken:
            client.send(b"no reply is read\n" * 4096)


# -- bytes -------------------------------------------------------------------------------------------------------------

ENDLESS = 200


@pytest.mark.timeout(120)
def test_unterminated_lines_of_64_kib_cost_what_the_limit_allows(report: Callable[[Figures], None]) -> None:
    """Lines of exactly the limit may wait; one byte more is an error; memory is the limit times the clients."""
    with serving() as echod:
        before = acquainted(echod)
        with scene(f"{ENDLESS} lines of 64 KiB without end", echod) as it:
            with _clients(echod.port, ENDLESS) as clients:
                _each_sends(clients, "ΐ".encode() * (LINE_BYTES // 2))
                while (stats := echod.stats())["held_bytes"] < ENDLESS * LINE_BYTES:
                    assert stats["connections"]["open"] <= ENDLESS + 1
                _each_sends(clients[ENDLESS // 2 :], b"z")
                for client in clients[: ENDLESS // 2]:
                    client.sendall(b"\n")
                    client.shutdown(socket.SHUT_WR)
                heard = Counter(map(read_to_end, clients))
        after = left_alone(echod, before)
        it.notes |= {"counted": closed_since(before, after), "held MB": round(stats["held_bytes"] / 1e6, 1)}
        report(it.row())
        answer = "ΐ".upper().encode() * (LINE_BYTES // 2) + b"\n"
        assert heard == {b"ERROR line longer than 65536 bytes\n": ENDLESS // 2, answer: ENDLESS // 2}
        assert closed_since(before, after) == {"line too long": ENDLESS // 2, "client": ENDLESS // 2 + 1}
        assert stats["held_bytes"] == ENDLESS * LINE_BYTES
        assert it.grown_bytes < 2 * ENDLESS * LINE_BYTES
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


NOISES = 400


@pytest.mark.timeout(120)
def test_binary_noise_is_answered_as_the_protocol_says(seed: str, report: Callable[[Figures], None]) -> None:
    """For any bytes in any chunks, the lines before the first invalid one are answered, then comes the error."""
    rng = random.Random(f"{seed}: noise")
    noises = [_noise(rng) for _ in range(NOISES)]
    with serving() as echod:
        before = acquainted(echod)
        with scene(f"{NOISES} streams of binary noise", echod) as it:
            heard = asyncio.run(_all_say(echod, [_any_chunks(rng, noise) for noise in noises]))
        after = left_alone(echod, before)
        it.notes["counted"] = closed_since(before, after)
        report(it.row())
        for noise, received in zip(noises, heard, strict=True):
            assert received == reference(noise, LINE_BYTES, is_ended=True), (seed, noise[:1000])
        assert after["connections"]["closed"]["invalid utf-8"] > NOISES // 4
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


def _noise(rng: random.Random) -> bytes:
    """Return random bytes, in a quarter of the cases only ASCII, in another with many line endings."""
    noise = rng.randbytes(rng.choice([1, 10, 1000, 100_000]))
    match rng.randrange(4):
        case 0:
            return bytes(byte & 0x7F for byte in noise)
        case 1:
            return b"whole\n" * 1000 + noise.replace(b"\x80", b"\n")
        case _:
            return noise


def _any_chunks(rng: random.Random, data: bytes) -> list[bytes]:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(20)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


async def _all_say(echod: Daemon, programs: Sequence[list[bytes]]) -> list[bytes]:
    """Return what clients receive for these chunks; each chunk is read before the next one is sent."""
    address = f"127.0.0.1:{echod.port}"
    rules = Rules((), (), (), ())
    clients = [Client(random.Random(), rules) for _ in programs]
    barrier = Client(random.Random(), rules)
    await asyncio.gather(*(client.connect(address) for client in (barrier, *clients)))
    for client in (barrier, *clients):
        client.listen()
    for turn in range(max(map(len, programs))):
        for client, chunks in zip(clients, programs, strict=True):
            await client.send(b"".join(chunks[turn : turn + 1]), chunk_bytes=1_000_000)
        await _pass(barrier)
    await asyncio.gather(*(client.finish() for client in (barrier, *clients)))
    assert {client.ending for client in clients} == {"eof"}
    for client in (barrier, *clients):
        await client.close()
    return [bytes(client.received) for client in clients]


async def _pass(barrier: Client) -> None:
    """Make a round trip, after which everything sent before it has been read."""
    await barrier.send(b"barrier\n")
    await barrier.hear(len(barrier.sent))


CHARACTERS = ("é", "ß", "ŉ", "€", "ΐ", "ﬃ", "😀", "𐐨")


@pytest.mark.timeout(120)
def test_utf_8_cut_anywhere_is_judged_by_its_bytes_alone(report: Callable[[Figures], None]) -> None:
    """Every prefix of a multi-byte character, in every two reads, is judged by its bytes alone."""
    texts = [
        b"whole\n" + b"pre" + character.encode()[:length] + end
        for character in CHARACTERS
        for length in range(len(character.encode()) + 1)
        for end in (b"", b"\n", b"\nnever reached\xff", b"\xc3\n")
    ]
    cuts = [[text[:place], text[place:]] for text in texts for place in range(6, len(text) + 1)]
    cuts += [[bytes([byte]) for byte in text] for text in texts]
    with serving() as echod:
        before = acquainted(echod)
        with scene(f"UTF-8 cut in {len(cuts)} ways", echod) as it:
            heard = asyncio.run(_all_say(echod, cuts))
        after = left_alone(echod, before)
        it.notes["counted"] = closed_since(before, after)
        report(it.row())
        for chunks, received in zip(cuts, heard, strict=True):
            assert received == reference(b"".join(chunks), LINE_BYTES, is_ended=True), chunks
        told = sum(received.endswith(INVALID) for received in heard)
        assert closed_since(before, after) == {"invalid utf-8": told, "client": len(cuts) - told + 2}
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


# -- all of it ---------------------------------------------------------------------------------------------------------

RULES = Rules(line_bytes=[LINE_BYTES], idle_s=[1.5], line_s=[1], write_s=[1])
CLIENTS = 60
CLIENTS_LIMIT = 90


@pytest.mark.timeout(240)
def test_every_misbehaviour_at_once_leaves_others_unaffected(
    seed: str, report: Callable[[Figures], None], request: pytest.FixtureRequest
) -> None:
    """With every misbehaviour at once, each client gets a correct prefix of what it was owed, and nothing leaks."""
    seconds = 60 if request.config.getoption("--full") else 30
    limits = settings(timeouts_line=1, timeouts_idle=1.5, timeouts_write=1, limits_connections=CLIENTS_LIMIT)
    with serving(*limits) as echod:
        before = acquainted(echod)
        crowd = Crowd(seed, RULES, [f"127.0.0.1:{echod.port}"])
        with scene(f"{CLIENTS} clients of every hostile kind, seed {seed}", echod) as it:
            asyncio.run(_play(crowd, seconds, echod))
        after = left_alone(echod, before)
        connections = after["connections"]
        it.notes |= {
            "visits": sum(crowd.visits.values()),
            "counted": closed_since(before, after) | connections["rejected"],
        }
        report(it.row())
        assert not crowd.complaints, "\n".join(crowd.complaints)
        assert connections["accepted"] + sum(connections["rejected"].values()) == crowd.connected + 2, (
            "and the bystander, and the first"
        )
        rare = {"drained", "cut"}
        assert connections["closed"].keys() - rare == closed_since(before, after).keys(), "the play has every ending"
        assert it.grown_bytes < CLIENTS_LIMIT * HELD_BYTES
        assert after["rss_bytes"] - before["rss_bytes"] < CLIENTS_LIMIT * HELD_BYTES
        it.assert_bystander_unaffected(slack_ms=SLACK_MS)


async def _play(crowd: Crowd, seconds: float, echod: Daemon) -> None:
    playing = asyncio.ensure_future(crowd.play(CLIENTS))
    end = time.monotonic() + seconds
    while time.monotonic() < end and not playing.done():
        await asyncio.to_thread(echod.stats)
        await asyncio.wait([playing], timeout=0.5)
    crowd.leave()
    await playing
