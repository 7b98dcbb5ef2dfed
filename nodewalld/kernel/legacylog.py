"""Tracing by the legacy backend: its log channel, heard through NFLOG.

x_tables tells of a traced packet by a log line, "TRACE: nat:OUTPUT:rule:2 ", handed to the logger that the network
namespace has for the family (sysctl net.netfilter.nf_log.2 and .10). The usual one writes into the kernel's log, and
only in the first namespace; nfnetlink_log hands it to the socket that has bound group 0, together with the packet.

Laws: a logger is changed only while somebody listens, and put back as it was. Who puts it back may be another than who
changed it (`tracerule`), so what it was stands in the kernel as long as it is changed.

Sources: include/uapi/linux/netfilter/nfnetlink_log.h; net/netfilter/nf_log.c (nf_log_trace, seq_show, the sysctl);
net/netfilter/nfnetlink_log.c (default_loginfo: group 0; NFULNL_CFG_CMD_PF_BIND; PF_UNBIND leaves NONE);
net/ipv4/netfilter/ip_tables.c, trace_packet.
"""

import errno
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from nodewalld.core.tracing.header import parse
from nodewalld.core.tracing.path import Kind, Sighting, Spot
from nodewalld.core.words import Backend, Family
from nodewalld.kernel.listening import Listener, interface, messages
from nodewalld.kernel.netlink import (
    BODY,
    HEADER,
    NFPROTO,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    U32,
    NetlinkError,
    NetlinkSocket,
    attribute,
    message,
    netfilter_body,
    spans,
    string,
)

NFLOG = "nfnetlink_log"
"""The logger's name."""

NONE = "NONE"

_PACKET, _CONFIG = 4 << 8, 4 << 8 | 1  # NFNL_SUBSYS_ULOG
_CFG_CMD, _CFG_MODE = 1, 2
_BIND, _PF_BIND, _PF_UNBIND = 1, 3, 4
_COPY_PACKET = 2
_ENOUGH = 128  # bytes of each packet
_MARK, _INDEV, _OUTDEV, _PAYLOAD, _PREFIX = 2, 4, 5, 9, 10
_ERRNO = struct.Struct("=i")
_FAMILIES = {number: family for family, number in NFPROTO.items()}
_TOOLS = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_LINE = re.compile(r"TRACE: ([^:\s]+):(\S+):(rule|return|policy):(\d+) ?")


class Taken(Exception):
    """Another program listens to what the legacy backend tells; the text is fit for people."""


def logger(family: Family) -> str:
    """The logger of a family in this network namespace; NONE where there is none."""
    for line in Path("/proc/thread-self/net/netfilter/nf_log").read_text().splitlines():
        number, name, *_ = line.split()
        if int(number) == NFPROTO[family]:
            return name
    return NONE


def set_logger(family: Family, name: str) -> None:
    """Choose a family's logger by name. Raises OSError, also where a sandbox forbids all but NFLOG and NONE."""
    if name == logger(family):
        return
    if name in (NFLOG, NONE):
        command = _PF_BIND if name == NFLOG else _PF_UNBIND
        body = netfilter_body(NFPROTO[family], attribute(_CFG_CMD, bytes([command])))
        with NetlinkSocket() as netlink:
            netlink.ask(_CONFIG, NLM_F_ACK, body, f"make {name} the logger of {family}")
    else:
        Path(f"/proc/sys/net/netfilter/nf_log/{NFPROTO[family]}").write_text(name)


class LegacyLog(Listener):
    """Hears what the legacy backend logs of traced packets. Raises Taken or OSError."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._configure(attribute(_CFG_CMD, bytes([_BIND])))
            self._configure(attribute(_CFG_MODE, struct.pack(">IBx", _ENOUGH, _COPY_PACKET)))
        except OSError as error:
            self.close()
            if error.errno in (errno.EPERM, errno.EBUSY):
                raise Taken(
                    "NFLOG group 0 belongs to another program, perhaps another trace or ulogd, "
                    "so the steps of the legacy backend can't be heard"
                ) from error
            raise

    def _configure(self, setting: bytes) -> None:
        """The kernel has answered when sending returns."""
        self._socket.send(message(_CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, netfilter_body(0, setting)))
        for datagram in filter(None, self._datagrams()):
            for kind, start, _ in messages(datagram):
                number = -_ERRNO.unpack_from(datagram, start + HEADER.size)[0] if kind == NLMSG_ERROR else 0
                if number:
                    raise NetlinkError(number, "listen to NFLOG group 0")

    def read(self) -> Iterator[Sighting]:
        """Everything that has been heard since the last read, without waiting. OSError ENOBUFS: some is lost."""
        return self._parsed(_parse)


def _parse(datagram: bytes) -> Iterator[Sighting]:
    for kind, start, end in messages(datagram):
        family = _FAMILIES.get(datagram[start + HEADER.size]) if kind == _PACKET and end - start >= BODY else None
        found = spans(datagram, start + BODY, end) if family else {}
        line = _LINE.match(string(datagram, *found[_PREFIX])) if _PREFIX in found else None
        if family is None or line is None:
            continue
        number = {key: U32.unpack_from(datagram, found[key][0])[0] for key in (_MARK, _INDEV, _OUTDEV) if key in found}
        yield Sighting(
            Spot(Backend.LEGACY, _TOOLS[family], line[1], line[2], Kind(line[3]), int(line[4])),
            family,
            parse(datagram[slice(*found[_PAYLOAD])]) if _PAYLOAD in found else None,
            "",
            interface(number.get(_INDEV, 0)),
            interface(number.get(_OUTDEV, 0)),
            number.get(_MARK, 0),
        )
