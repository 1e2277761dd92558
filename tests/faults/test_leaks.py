"""Connections leave no descriptor, task or memory behind."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.daemon import Daemon, Event, connect, serving

CONNECTIONS = 20_000


@pytest.mark.timeout(120)
def test_20_000_connections_leave_descriptors_tasks_and_memory_as_they_were() -> None:
    """After 20 000 connections, descriptors and memory are as before."""
    with serving() as echod:
        _come_and_go(echod.port, CONNECTIONS // 4)  # the allocator's first growth is no leak
        before = _settled(echod)
        _come_and_go(echod.port, CONNECTIONS)
        after = _settled(echod)
        assert after["connections"]["accepted"] - before["connections"]["accepted"] == CONNECTIONS
        assert after["open_files"] == before["open_files"]
        assert after["rss_bytes"] - before["rss_bytes"] < 1_000_000, "50 bytes a connection would be a leak"
        assert echod.stop() == 0


def _come_and_go(port: int, count: int) -> None:
    with ThreadPoolExecutor(4) as clients:
        for ended in [clients.submit(_connect_again_and_again, port, count // 4) for _ in range(4)]:
            ended.result()


def _connect_again_and_again(port: int, count: int) -> None:
    for _ in range(count):
        with connect(port) as client:
            client.sendall(b"x\n")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(10) == b"X\n"


def _settled(echod: Daemon) -> Event:
    while (stats := echod.stats())["connections"]["open"]:
        pass
    return stats
