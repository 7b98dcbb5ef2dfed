"""Which BPF programs sit on an interface by tcx, and what a program is called: the bpf(2) calls that only ask.

Law: what may not be asked is not known, and no error: the unit's sandbox forbids bpf(2), and names want CAP_SYS_ADMIN.

Sources: include/uapi/linux/bpf.h (BPF_PROG_QUERY, BPF_PROG_GET_FD_BY_ID, BPF_OBJ_GET_INFO_BY_FD; BPF_TCX_INGRESS since
6.6), and the kernel's tables of system calls for the number.
"""

import ctypes
import os
import platform
import struct

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_GET_FD_BY_ID, _GET_INFO_BY_FD, _QUERY = 13, 15, 16
_TCX = {"ingress": 46, "egress": 47}
_QUERIED = struct.Struct("@IIIIQI4x")  # interface, attach type, flags, flags, ids, their number
_IDS_MAX = 64  # programs in one place of one interface
_ATTRIBUTES_SIZE = 512  # union bpf_attr is 168 bytes in Linux 6.18; what is zero is not asked for
_ATTRIBUTES_SIZE = 512  # more than any kernel's union bpf_attr; what is zero is not asked for
_INFO_SIZE, _NAME = 232, slice(64, 80)

_libc = ctypes.CDLL(None, use_errno=True)


def attached(interface: int, place: str) -> tuple[int, ...]:
    """The ids of the programs that tcx runs at "ingress" or "egress" of the interface with this index."""
    ids = (ctypes.c_uint32 * _IDS_MAX)()
    query = bytearray(_QUERIED.pack(interface, _TCX[place], 0, 0, ctypes.addressof(ids), _IDS_MAX))
    if _bpf(_QUERY, query) < 0:
        return ()
    return tuple(ids[: _QUERIED.unpack(query)[5]])


def name_of(program: int) -> str:
    """The name (15 characters at most) of the program with this id; "" where it may not be asked, or has none."""
    descriptor = _bpf(_GET_FD_BY_ID, bytearray(struct.pack("@III", program, 0, 0)))
    if descriptor < 0:
        return ""
    try:
        info = ctypes.create_string_buffer(_INFO_SIZE)
        asked = bytearray(struct.pack("@IIQ", descriptor, _INFO_SIZE, ctypes.addressof(info)))
        done = _bpf(_GET_INFO_BY_FD, asked)
        return info.raw[_NAME].split(b"\0")[0].decode(errors="replace") if done == 0 else ""
    finally:
        os.close(descriptor)


def _bpf(command: int, attributes: bytearray) -> int:
    """The call's outcome, its answer in `attributes`; -1 where it may not be made.

    Newer kernels write more of an answer than they were asked for: the buffer is larger than any of theirs so far.
    """
    number = _NUMBERS.get(platform.machine())
    if number is None:
        return -1
    buffer = ctypes.create_string_buffer(bytes(attributes), _ATTRIBUTES_SIZE)
    done = int(_libc.syscall(number, command, buffer, _ATTRIBUTES_SIZE))
    attributes[:] = buffer.raw[: len(attributes)]
    return done
