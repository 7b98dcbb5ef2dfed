"""Sends to guarded and open ports of the machine without a pause, and counts what arrives; runs on the machine itself.

`flood.py receive FILE PORT...` binds UDP ports in both families and keeps the counts in FILE;
`flood.py send ADDRESS[,SOURCE] PORT...` sends to each port every millisecond, as often as the port is named.
"""

import contextlib
import json
import selectors
import socket
import sys
import time
from pathlib import Path


def receive(file: Path, ports: list[int]) -> None:
    """Count for ever."""
    counts = dict.fromkeys(ports, 0)
    selector = selectors.DefaultSelector()
    for port in ports:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, port)
    while True:
        for key, _ in selector.select(0.05):
            with contextlib.suppress(BlockingIOError):
                while key.fileobj.recv(64):
                    counts[key.data] += 1
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(counts))
        fresh.rename(file)


def send(address: str, source: str, ports: list[int]) -> None:
    """Send for ever."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sender = socket.socket(family, socket.SOCK_DGRAM)
    if source:
        sender.bind((source, 0))
    due = time.monotonic()
    while True:
        for port in ports:
            with contextlib.suppress(OSError):
                sender.sendto(b"x", (address, port))
        due = max(due + 0.001, time.monotonic() - 0.05)  # what the machine stood still for is not made up for
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    what, where, *numbers = sys.argv[1:]
    if what == "receive":
        receive(Path(where), list(map(int, numbers)))
    else:
        to, _, source = where.partition(",")
        send(to, source, list(map(int, numbers)))
