"""One end of a flow through a node, run within a namespace: `sink PROTOCOL PORT` or
`send PROTOCOL SOURCE ADDRESS PORT TIMES`.

Law: what is told is the processor time of this end, which on veth holds what the kernel did for its packets on the way.
"""

import socket
import sys
import time

_SMALL = bytes(64)
_LARGE = bytes(1 << 16)


def _sink(protocol: str, port: int) -> None:
    if protocol == "udp":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.bind(("", port))
            print("ready", flush=True)
            sys.stdin.read()  # what nobody reads is dropped at the end of its way
            return
    with socket.create_server(("", port)) as listener:
        print("ready", flush=True)
        room = bytearray(1 << 20)
        while True:
            end, _ = listener.accept()
            with end:
                begun = time.thread_time()
                while end.recv_into(room):
                    pass
                end.send(repr(time.thread_time() - begun).encode())


def _send(protocol: str, source: str, to: tuple[str, int], times: int) -> float:
    """Processor seconds for so many small datagrams, or so many times 64 KiB of a stream, both ends counted."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as end:
        end.bind((source, 0))
        end.connect(to)
        begun = time.thread_time()
        send, content = (end.send, _SMALL) if protocol == "udp" else (end.sendall, _LARGE)
        for _ in range(times):
            send(content)
        spent = time.thread_time() - begun
        if protocol == "tcp":
            end.shutdown(socket.SHUT_WR)
            spent += float(end.recv(64))
        return spent


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        _sink(sys.argv[2], int(sys.argv[3]))
    else:
        _, _, protocol, source, address, port, times = sys.argv
        print(_send(protocol, source, (address, int(port)), int(times)))
