"""ipsets: read through netlink, replaced whole through one `ipset restore`, changed a little through one message.

Law: a set that rules refer to is never seen empty or half full: its new content is loaded under a temporary name and
swapped in, which is atomic. A set of the same name that is not of our making in type or family is left alone and
reported. Whatever an earlier, killed load left behind is swept away by the next one.

Sources: include/uapi/linux/netfilter/ipset/ip_set.h; ipset(8). hash:net can't hold a prefix of length 0:
"everywhere" is two halves. No event tells of a change.
"""

import errno
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network

from nodewalld.core.words import Family, Network
from nodewalld.kernel.closing import Closing
from nodewalld.kernel.netlink import (
    BODY,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_EXCL,
    U32,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    nested,
    netfilter_body,
    spans,
    string,
    text,
)
from nodewalld.kernel.process import Result
from nodewalld.kernel.process import run as run_program

_IPSET = 6 << 8  # NFNL_SUBSYS_IPSET
_DESTROY = _IPSET | 3
_LIST = _IPSET | 7
_ADD, _DEL = _IPSET | 9, _IPSET | 10

_PROTOCOL, _SETNAME, _TYPENAME, _FAMILY, _FLAGS, _DATA, _ADT, _LINENO = 1, 2, 3, 5, 6, 7, 8, 9
_IP, _CIDR, _CADT_FLAGS, _MAXELEM, _ELEMENTS, _REFERENCES = 1, 3, 8, 19, 24, 25
_ONLY_NAMES, _ONLY_HEADERS = 1 << 1, 1 << 2  # IPSET_FLAG_LIST_SETNAME, IPSET_FLAG_LIST_HEADER
_NOMATCH = 1 << 2  # IPSET_FLAG_NOMATCH
_PROTOCOL_VERSION = attribute(_PROTOCOL, bytes([6]))  # 6 is taken by every kernel since 2.6.39
_FAMILIES = {2: Family.IPV4, 10: Family.IPV6}
_NET_BYTEORDER = 1 << 14  # NLA_F_NET_BYTEORDER
_IPADDR = {Family.IPV4: 1, Family.IPV6: 2}  # IPSET_ATTR_IPADDR_IPV4, IPSET_ATTR_IPADDR_IPV6
_WORDS = {Family.IPV4: "inet", Family.IPV6: "inet6"}

_LENGTH = struct.Struct("=H")
_CIDR_HEADER = struct.pack("=HH", 5, _CIDR)

_ERR_BUSY = 4100  # IPSET_ERR_BUSY: a rule refers to the set
_PAUSES = (0.0, 0.02, 0.05, 0.1, 0.2)  # while somebody lists a set, the kernel swaps it with no other (EBUSY)
_SMALLEST = 65536
_FEW = 256
"""Entries that one message can change; of IPv6 some 1,600 would fit. A swap costs as much as the whole set."""

SET_TYPE = "hash:net"

Entry = tuple[bytes, int, bool]
"""Address, prefix length, and whether it is an exception (nomatch)."""


class SetError(Exception):
    """A set could not be loaded or removed; the text is ipset's own."""


class SetTypeConflict(SetError):
    """A set of this name exists with another type or family: the operator's to decide."""

    def __init__(self, name: str, found: "SetHeader", wanted: str) -> None:
        super().__init__(
            f"set {name} exists already as {found}, not as {wanted}; run `ipset destroy {name}`, or choose another name"
        )


@dataclass(frozen=True, slots=True)
class SetHeader:
    """What a set is, without its entries; `family` is None for a type that has none."""

    type_name: str
    family: Family | None
    maxelem: int
    size: int
    references: int

    def __str__(self) -> str:
        return f"{self.type_name} family {_WORDS[self.family]}" if self.family else self.type_name


class Sets(Closing):
    """Reads and replaces ipsets through one socket, kept open, and one program."""

    def __init__(self, run: Callable[..., Result] = run_program, sleep: Callable[[float], object] = time.sleep) -> None:
        self._run = run
        self._sleep = sleep
        self._netlink = NetlinkSocket()

    def names(self) -> tuple[str, ...]:
        """All sets of this network namespace."""
        body = netfilter_body(0, _PROTOCOL_VERSION, attribute(_FLAGS, U32.pack(_ONLY_NAMES)))
        answers = self._netlink.ask(_LIST, NLM_F_DUMP, body, "list the names of all sets")
        return tuple(string(answer, *spans(answer, BODY, len(answer))[_SETNAME]) for _, answer in answers)

    def header(self, name: str) -> SetHeader | None:
        """A set's type and size, or None when there is no such set."""
        answers = self._list(name, _ONLY_HEADERS)
        if not answers:
            return None
        answer = answers[0]
        found = spans(answer, BODY, len(answer))
        data = spans(answer, *found[_DATA])

        def number(kind: int) -> int:
            return int(U32.unpack_from(answer, data[kind][0])[0]) if kind in data else 0

        return SetHeader(
            type_name=string(answer, *found[_TYPENAME]),
            family=_FAMILIES.get(answer[found[_FAMILY][0]]),
            maxelem=number(_MAXELEM),
            size=number(_ELEMENTS),
            references=number(_REFERENCES),
        )

    def entries(self, name: str) -> frozenset[Network | str]:
        """The networks of a hash:net or hash:ip set; an exception comes as text, `10.0.0.0/24 nomatch`."""
        found: set[Network | str] = set()
        for packed, length, nomatch in self._entries(name):
            network: Network = IPv4Network((packed, length)) if len(packed) == 4 else IPv6Network((packed, length))
            found.add(f"{network} nomatch" if nomatch else network)
        return frozenset(found)

    def holds(self, name: str, networks: Iterable[Network]) -> bool:
        """Whether a set holds exactly these networks; half the cost of comparing `entries`."""
        return set(map(_packed, _halved(networks))) == set(self._entries(name))

    def fill(self, name: str, family: Family, networks: frozenset[Network]) -> bool:
        """Give a set that may hold it already this content, by the least that does; returns whether it had to change.

        Raises what `replace` does.
        """
        header = self.header(name)
        if header is None or (header.type_name, header.family) != (SET_TYPE, family):
            self.replace(name, family, networks)
            return True
        wanted = set(map(_packed, _halved(networks)))
        held = set(self._entries(name))
        coming, going = wanted - held, held - wanted
        if not coming and not going:
            return False
        if any(nomatch for _, _, nomatch in going) or not self._amend(header, name, family, coming, going):
            self.replace(name, family, networks)
        return True

    def replace(self, name: str, family: Family, networks: Iterable[Network]) -> None:
        """Give a set this content at one stroke, making it if need be.

        Raises SetTypeConflict, SetError, ProgramError.
        """
        existing = self.header(name)
        wanted = SetHeader(SET_TYPE, family, 0, 0, 0)
        if existing is not None and (existing.type_name, existing.family) != (SET_TYPE, family):
            raise SetTypeConflict(name, existing, str(wanted))
        temporary = temporary_name(name)
        script = render_swap(name, family, tuple(networks), exists=existing is not None)
        for pause in _PAUSES:
            self._sleep(pause)
            self.destroy(temporary)
            result = self._run(["ipset", "-exist", "restore"], stdin=script)
            if result.status == 0:
                return
            self.destroy(temporary)
            if os.strerror(errno.EBUSY) not in result.stderr:
                break
        raise SetError(f"set {name} could not be loaded: {result.stderr.strip()}")

    def change(self, name: str, family: Family, old: frozenset[Network], new: frozenset[Network]) -> None:
        """Give a set that holds `old` this content: a few entries one by one, all else as `replace` does, and raises.

        What stays is never missed; what comes is there before the first goes.
        """
        coming, going = list(map(_packed, new - old)), list(map(_packed, old - new))
        found = self.header(name)
        known = found is not None and (found.type_name, found.family, found.size) == (SET_TYPE, family, len(old))
        if found is None or not known or not self._amend(found, name, family, coming, going):
            self.replace(name, family, new)

    def _amend(
        self, header: SetHeader, name: str, family: Family, coming: Collection[Entry], going: Collection[Entry]
    ) -> bool:
        """Add and delete a few entries; False when they are too many, or can't all be told to the kernel so."""
        if len(coming) + len(going) > _FEW or header.size + len(coming) > header.maxelem:
            return False
        try:
            self._tell(_ADD, name, family, coming)
            self._tell(_DEL, name, family, going)
        except NetlinkError:  # such as for a /0, which is two entries
            return False
        return True

    def _tell(self, command: int, name: str, family: Family, entries: Iterable[Entry]) -> None:
        """Add or delete entries in one message; without NLM_F_EXCL, as `-exist` does."""
        elements = [_element(family, entry) for entry in entries]
        if elements:
            line = attribute(_LINENO, U32.pack(0))  # the kernel wants one, to say where it stopped
            body = netfilter_body(0, _PROTOCOL_VERSION, text(_SETNAME, name), line, nested(_ADT, *elements))
            self._netlink.ask(command, NLM_F_ACK, body, f"change set {name}")

    def destroy(self, name: str) -> bool:
        """Remove a set; False when there was none. Raises SetError while a rule refers to it.

        On nft a deleted rule keeps its set for some milliseconds more: the kernel frees rules later.
        """
        body = netfilter_body(0, _PROTOCOL_VERSION, text(_SETNAME, name))
        try:
            # Without NLM_F_EXCL the kernel takes it as `-exist`, and is content with a set that is not there.
            self._netlink.ask(_DESTROY, NLM_F_ACK | NLM_F_EXCL, body, f"destroy set {name}")
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return False
            why = "a rule still refers to it, or somebody is listing it" if error.errno == _ERR_BUSY else str(error)
            raise SetError(f"set {name} can't be destroyed: {why}") from error
        return True

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def _list(self, name: str, flags: int) -> list[bytes]:
        body = netfilter_body(0, _PROTOCOL_VERSION, text(_SETNAME, name), attribute(_FLAGS, U32.pack(flags)))
        try:
            return [answer for _, answer in self._netlink.ask(_LIST, NLM_F_DUMP, body, f"read set {name}")]
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def _entries(self, name: str) -> Iterator[Entry]:
        for answer in self._list(name, 0):
            found = spans(answer, BODY, len(answer))
            for _, start, end in attributes(answer, *found.get(_ADT, (0, 0))):
                (size,) = _LENGTH.unpack_from(answer, start)
                if end - start == size + 8 and answer[start + size : start + size + 4] == _CIDR_HEADER:
                    # An address and a prefix length and nothing else, as of old; spelled out for speed.
                    yield answer[start + 8 : start + size], answer[start + size + 4], False
                else:
                    yield _parse_entry(answer, start, end)


def _packed(network: Network) -> Entry:
    return network.network_address.packed, network.prefixlen, False


def _element(family: Family, entry: Entry) -> bytes:
    packed, length, _ = entry
    address = nested(_IP, attribute(_IPADDR[family] | _NET_BYTEORDER, packed))
    return nested(_DATA, address, attribute(_CIDR, bytes([length])))


def _parse_entry(answer: bytes, start: int, end: int) -> Entry:
    data = spans(answer, start, end)
    first, last = data[_IP]
    packed = answer[first + 4 : last]  # one attribute within, named by the family
    length = answer[data[_CIDR][0]] if _CIDR in data else len(packed) * 8
    flags = U32.unpack_from(answer, data[_CADT_FLAGS][0])[0] if _CADT_FLAGS in data else 0
    return packed, length, bool(flags & _NOMATCH)


def temporary_name(name: str) -> str:
    """The name under which a set is loaded before it is swapped in: always the same, so leftovers are found."""
    return f"NW-{blake2b(name.encode(), digest_size=4).hexdigest()}"


def capacity(count: int) -> int:
    """The maxelem of a set: room to double, so that a growing set keeps its size for long."""
    return max(_SMALLEST, 1 << (2 * count).bit_length())


def render_swap(
    name: str, family: Family, networks: Iterable[Network], *, exists: bool, maxelem: int | None = None
) -> str:
    """The `ipset -exist restore` script that loads a temporary set, swaps it in and drops the old content."""
    entries = _halved(networks)
    temporary = temporary_name(name)
    kind = f"{SET_TYPE} family {_WORDS[family]} maxelem {maxelem or capacity(len(entries))}"
    lines = [f"create {temporary} {kind}"]
    lines += sorted(f"add {temporary} {entry}" for entry in entries)
    if not exists:
        lines.append(f"create {name} {kind}")
    lines += [f"swap {temporary} {name}", f"destroy {temporary}"]
    return "\n".join(lines) + "\n"


def _halved(networks: Iterable[Network]) -> frozenset[Network]:
    """The networks, once each, with every /0 as its two halves."""
    entries = frozenset(networks)
    whole = [network for network in entries if not network.prefixlen]
    halves: list[Network] = [half for network in whole for half in network.subnets(1)]
    return entries.union(halves).difference(whole) if whole else entries
