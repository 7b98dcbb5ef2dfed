"""Puts BPF programs on interfaces until its standard input ends; a script for the inside of a node.

Each argument is INTERFACE:PLACE:NAME with a place of xdp, ingress, egress (classifiers of tc) or tcx (ingress, since
Linux 6.6). The programs let every packet pass.
"""

import ctypes
import platform
import socket
import struct
import sys

from pyroute2 import IPRoute

NUMBER = {"x86_64": 321, "aarch64": 280}[platform.machine()]
PROG_LOAD, LINK_CREATE = 5, 28
SCHED_CLS, XDP = 3, 6
XDP_PASS, TC_ACT_UNSPEC = 2, -1
TCX_INGRESS = 46

libc = ctypes.CDLL(None, use_errno=True)
held = []


def bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    done = libc.syscall(NUMBER, command, buffer, len(attributes))
    if done < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command})")
    return int(done)


def load(kind: int, verdict: int, name: str) -> int:
    """A program of two instructions: r0 = verdict; exit."""
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, verdict, 0x95, 0, 0, 0), 16)
    license_text = ctypes.create_string_buffer(b"GPL")
    held.extend([code, license_text])
    addresses = ctypes.addressof(code), ctypes.addressof(license_text)
    return bpf(PROG_LOAD, struct.pack("=IIQQIIQII16s", kind, 2, *addresses, 0, 0, 0, 0, 0, name.encode()) + bytes(56))


def main() -> None:
    with IPRoute() as route:
        for argument in sys.argv[1:]:
            interface, place, name = argument.split(":")
            index = socket.if_nametoindex(interface)
            if place == "xdp":
                route.link("set", index=index, xdp_fd=load(XDP, XDP_PASS, name))
                continue
            program = load(SCHED_CLS, TC_ACT_UNSPEC, name)
            if place == "tcx":
                held.append(bpf(LINK_CREATE, struct.pack("=IIII", program, index, TCX_INGRESS, 0) + bytes(48)))
                continue
            if not any(q.get_attr("TCA_KIND") == "clsact" for q in route.get_qdiscs(index)):
                route.tc("add", "clsact", index)
            parent = "ffff:fff2" if place == "ingress" else "ffff:fff3"
            options = {"fd": program, "name": name, "parent": parent, "classid": 1, "direct_action": True}
            route.tc("add-filter", "bpf", index, ":1", **options)
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
