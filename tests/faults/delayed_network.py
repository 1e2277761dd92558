"""A network with a delay, and a stop while clients connect over it; a module to run in its own network namespace.

A TUN device returns each packet after a delay with source and destination swapped, so that a connection to AFAR reaches
this machine, delayed. Prints the results of the clients as JSON.
"""

import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

from tests.support.daemon import DEADLINE_S, Daemon, read_to_end

HERE, AFAR = "10.9.0.1", "10.9.0.2"
CLIENTS = 60
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x1, 0x1000
IP_VERSION, IP_ADDRESSES = 0, slice(12, 20)


def lay_wire(delay_s: float) -> None:
    """Make AFAR reachable with a delay of `delay_s` in each direction."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"wire", IFF_TUN | IFF_NO_PI))
    for command in (f"address add {HERE}/24 dev wire", "link set wire up", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True)
    threading.Thread(target=_carry, args=(device, delay_s), daemon=True).start()


def _carry(device: int, delay_s: float) -> None:
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        left_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        if select.select([device], [], [], left_s)[0]:
            packet = os.read(device, 65536)
            if packet[IP_VERSION] >> 4 == 4:  # swapping the addresses changes no checksum
                returned = packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
                under_way.append((time.monotonic() + delay_s, returned))
        while under_way and under_way[0][0] <= time.monotonic():
            os.write(device, under_way.popleft()[1])


def fare(port: int, wait_s: float) -> str:
    """Connect after a delay, and return the result."""
    time.sleep(wait_s)
    try:
        client = socket.create_connection((AFAR, port), DEADLINE_S)
    except ConnectionRefusedError:
        return "refused"
    with client:
        try:
            client.sendall(b"from afar\n")
            client.shutdown(socket.SHUT_WR)
            received = read_to_end(client)
        except ConnectionError as error:
            return repr(error)
    return "served" if received == b"FROM AFAR\n" else repr(received)


def main(delay_s: float) -> None:
    lay_wire(delay_s)
    with Daemon("-l", "0.0.0.0:0") as echod, ThreadPoolExecutor(CLIENTS) as clients:
        span_s = 6 * delay_s
        fares = [clients.submit(fare, echod.port, span_s * number / CLIENTS) for number in range(CLIENTS)]
        time.sleep(span_s / 2)  # the middle of the period in which the clients connect
        echod.stop()
        json.dump(Counter(each.result() for each in fares), sys.stdout)


if __name__ == "__main__":
    main(float(sys.argv[1]))
