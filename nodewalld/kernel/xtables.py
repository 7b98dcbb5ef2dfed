"""The legacy backend's tables, read as the kernel holds them: no process, no lock, no text.

Law: looking changes nothing. Asking for a table that does not exist would create it (with its hooks, for
good), so a table that /proc does not list is never asked for. A fingerprint is of what the rules say; what
packets change in them (the counters) never counts. Equal sizes prove nothing: a moved rule keeps them.

Sources: include/uapi/linux/netfilter_ipv4/ip_tables.h (ipt_getinfo, ipt_get_entries, ipt_entry) and the same
of netfilter_ipv6; net/ipv4/netfilter/ip_tables.c, copy_entries_to_user; net/netfilter/x_tables.c,
xt_data_to_user: the private part of matches and targets (limit's credit, statistic's count, pointers) is
zeroed on its way out (since 4.11).
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from nodewalld.core.words import Family
from nodewalld.kernel.closing import Closing

_SO_GET_INFO = 64  # IPT_SO_GET_INFO, IP6T_SO_GET_INFO
_SO_GET_ENTRIES = 65
_INFO = struct.Struct("@32sI5I5III")  # name, hooks, where their rules begin, their policies, entries, bytes
_HEAD = 40  # ipt_get_entries up to the entries
_ATTEMPTS = 10  # a table that is replaced between the two calls has another size: EAGAIN
_NO_COUNTERS = bytes(16)
_COUNTERS = struct.Struct("@QQ")  # packets, bytes
_OFFSETS = struct.Struct("@HH")  # of the target and of the next entry
_VERDICT = struct.Struct("@i")  # of the standard target; an offset into the table when it isn't negative
_SIZE = struct.Struct("@H")
_SO_IP_SET, _SET_BY_INDEX, _SET_PROTOCOL = 83, 7, 6  # uapi ip_set.h: ip_set_req_get_set
_NO_SET = 0xFFFF  # IPSET_INVALID_ID
_SET_REQUEST = struct.Struct("@IIH30s")
_ERROR_TARGET = b"ERROR\0"
_ERROR_SIZE = 64  # xt_error_target, padded
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")  # in the order of enum nf_inet_hooks

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What tells the two families' entries apart."""

    address_family: int
    level: int
    names: str
    offsets: int  # where an entry keeps its target_offset and next_offset
    counters: int


_LAYOUTS = {
    Family.IPV4: _Layout(socket.AF_INET, 0, "ip_tables_names", 88, 96),
    Family.IPV6: _Layout(socket.AF_INET6, 41, "ip6_tables_names", 140, 152),
}


class LegacyError(OSError):
    """The kernel did not show a table that it lists: the system's fault, with the kernel's own errno."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, f"{what}: {os.strerror(number)}")


class LegacyReader(Closing):
    """Reads the legacy tables of one family through one raw socket, kept open."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._layout = _LAYOUTS[family]
        self._socket = socket.socket(self._layout.address_family, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def tables(self) -> frozenset[str]:
        """The tables that exist; none where the legacy backend was never used in this network namespace."""
        try:
            # Not /proc/net: that is the main thread's network namespace, the socket's is this thread's.
            handle = os.open(f"/proc/thread-self/net/{self._layout.names}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return frozenset()
        try:
            return frozenset(os.read(handle, 4096).decode().split())
        finally:
            os.close(handle)

    def fingerprint(self, table: str) -> bytes | None:
        """A digest of all rules, chains and policies of a table, or None when it does not exist."""
        content = self._content(table)
        if content is None:
            return None
        info, entries = content
        counters = self._layout.counters
        for start, _, _ in self._walk(entries):
            entries[start + counters : start + counters + 16] = _NO_COUNTERS
        digest = blake2b(entries, digest_size=16)
        digest.update(info)
        return digest.digest()

    def size(self, table: str) -> int:
        """How many bytes a look at this table must fetch; 0 when it does not exist."""
        if table not in self.tables():
            return 0
        return int(_INFO.unpack(self._info(table))[-1])

    def chains(self, table: str) -> tuple[str, ...]:
        """The names of the user's chains in a table, in the kernel's order."""
        content = self._content(table)
        if content is None:
            return ()
        heads = (_chain_name(content[1], start + target) for start, target, _ in self._walk(content[1]))
        return tuple(name for name in heads if name is not None)[:-1]

    def tallies(self, table: str) -> dict[str, tuple[tuple[int, int], ...]]:
        """What each rule of the user's chains has seen: packets and bytes, by chain and from its top."""
        content = self._content(table)
        found: dict[str, list[tuple[int, int]]] = {}
        rules: list[tuple[int, int]] = []
        entries = content[1] if content else bytearray()
        for start, target, _ in self._walk(entries):
            name = _chain_name(entries, start + target)
            if name is None:
                rules.append(_COUNTERS.unpack_from(entries, start + self._layout.counters))
            else:
                rules = found.setdefault(name, [])
        # A user's chain ends in a RETURN that nobody wrote.
        return {name: tuple(seen[:-1]) for name, seen in found.items()}

    def rules(self, table: str) -> dict[str, tuple[bytes, ...]] | None:
        """What each rule says, by chain and from its top, as a digest; None when the table does not exist.

        Rules with one digest have one text: it is of the whole rule, with the name of the chain that it leads to.
        """
        content = self._content(table)
        if content is None:
            return None
        info, entries = content
        _, valid, *places, _, _ = _INFO.unpack(info)
        starts = {places[hook]: name for hook, name in enumerate(_HOOKS) if valid & (1 << hook)}
        walked = list(self._walk(entries))
        heads: set[int] = set()
        for start, target, following in walked:
            if (name := _chain_name(entries, start + target)) is not None:
                heads.add(start)
                starts[start + following] = name  # behind the table's last entry nothing begins
        found: dict[str, list[bytes]] = {}
        rules: list[bytes] = []
        for start, target, following in walked:
            if start in starts:
                rules = found.setdefault(starts[start], [])
            if start not in heads:
                rules.append(self._said(entries, start, target, following, starts))
        # A chain ends in its policy, or a user's one in a RETURN that nobody wrote.
        return {name: tuple(said[:-1]) for name, said in found.items()}

    def _said(self, entries: bytearray, start: int, target: int, following: int, starts: Mapping[int, str]) -> bytes:
        """The digest of a rule."""
        rule = entries[start : start + following]
        layout = self._layout
        rule[layout.counters : layout.counters + 16] = _NO_COUNTERS
        rule[layout.offsets + 4 : layout.offsets + 8] = bytes(4)  # comefrom: from which hooks the kernel gets here
        names = [self._set_name(rule, at) for at in self._sets(rule, target)]
        if not rule[target + 2]:  # the standard target has no name
            (verdict,) = _VERDICT.unpack_from(rule, target + 32)
            if verdict >= 0:
                # A rule without a target leads to the one behind it; no chain begins there, each having its own end.
                names.append(b"" if verdict == start + following else starts[verdict].encode(errors="surrogateescape"))
                _VERDICT.pack_into(rule, target + 32, 0)
        return blake2b(b"\0".join((bytes(rule), *names)), digest_size=16).digest()

    def _sets(self, rule: bytearray, target: int) -> Iterator[int]:
        """Where a rule holds the numbers of ipsets (xt_set.h: xt_set_info, at the beginning of the private part)."""
        at = self._layout.counters + 16
        while at < target:
            (size,) = _SIZE.unpack_from(rule, at)
            if rule[at + 2 : at + 6] == b"set\0":
                yield at + 32
            at += size or target
        if rule[target + 2 : target + 6] == b"SET\0":
            last = 3 if rule[target + 31] >= 3 else 2  # to add to, to delete from, and since revision 3 to map
            places = range(target + 32, target + 32 + 4 * last, 4)
            yield from (at for at in places if _SIZE.unpack_from(rule, at)[0] != _NO_SET)

    def _set_name(self, rule: bytearray, at: int) -> bytes:
        """The name of the set with this number, which is blanked: it may be another set's tomorrow."""
        (number,) = _SIZE.unpack_from(rule, at)
        _SIZE.pack_into(rule, at, 0)
        request = bytearray(_SET_REQUEST.pack(_SET_BY_INDEX, _SET_PROTOCOL, number, bytes(30)))
        if self._getsockopt(_SO_IP_SET, request, self._ipset):
            return os.urandom(16)  # it has gone meanwhile: like nothing that is known
        return bytes(request[8:]).partition(b"\0")[0]

    def mentions(self, table: str, words: bytes) -> bool:
        """Whether these bytes stand anywhere in a table, in a comment for example."""
        content = self._content(table)
        return content is not None and words in content[1]

    def jumps(self, table: str) -> dict[str, tuple[str, ...]]:
        """Where each rule of the built-in chains jumps to, in order, by chain: a user's chain, or "" for none."""
        content = self._content(table)
        if content is None:
            return {}
        _, hooks, *numbers = _INFO.unpack(content[0])
        entries = content[1]
        return {
            chain: tuple(self._targets(entries, first, last))
            for hook, chain in enumerate(_HOOKS)
            if hooks & 1 << hook
            for first, last in [(numbers[hook], numbers[hook + len(_HOOKS)])]
        }

    def _targets(self, entries: bytearray, start: int, policy: int) -> Iterator[str]:
        """The chain that each rule between two offsets jumps to, or ""."""
        whole = self._layout.counters + _COUNTERS.size
        for at, target, _ in self._walk(entries, start, policy):
            (verdict,) = _VERDICT.unpack_from(entries, at + target + 32)
            # A jump leads behind the head of its chain, which is an entry without matches.
            jumps = not entries[at + target + 2] and verdict >= whole + _ERROR_SIZE
            yield (_chain_name(entries, verdict - _ERROR_SIZE) if jumps else None) or ""

    def has_chain(self, table: str, name: str) -> bool:
        """Whether a table holds a user's chain of this name."""
        return name in self.chains(table)

    def close(self) -> None:
        """Close the sockets."""
        self._socket.close()
        if "_ipset" in self.__dict__:
            self._ipset.close()

    def _walk(self, entries: bytearray, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
        """The entries of a table, or a part of them: (start, offset of the target, offset of the next entry)."""
        end, at, unpack = len(entries) if end is None else end, self._layout.offsets, _OFFSETS.unpack_from
        while start < end:
            target, following = unpack(entries, start + at)
            if following < self._layout.counters + 16:
                raise LegacyError(errno.EBADMSG, f"walk the entries of a {self._family} table")
            yield start, target, following
            start += following

    def _content(self, table: str) -> tuple[bytes, bytearray] | None:
        """The table's info and its entries; None when it does not exist."""
        if table not in self.tables():
            return None
        for _ in range(_ATTEMPTS):
            info = self._info(table)
            size = int(_INFO.unpack(info)[-1])
            # Fresh and zeroed each time: the kernel does not write behind the end of a match's name, and what
            # was there before would be part of the fingerprint.
            buffer = bytearray(_HEAD + size)
            struct.pack_into("@32sI", buffer, 0, table.encode(), size)
            number = self._getsockopt(_SO_GET_ENTRIES, buffer)
            if number == 0:
                del buffer[:_HEAD]
                return info, buffer
            if number != errno.EAGAIN:
                raise LegacyError(number, f"read table {table} ({self._family}, legacy)")
        raise LegacyError(errno.EAGAIN, f"read table {table} ({self._family}, legacy)")

    def _info(self, table: str) -> bytes:
        buffer = bytearray(_INFO.size)
        struct.pack_into("@32s", buffer, 0, table.encode())
        number = self._getsockopt(_SO_GET_INFO, buffer)
        if number:
            raise LegacyError(number, f"read the size of table {table} ({self._family}, legacy)")
        return bytes(buffer)

    @cached_property
    def _ipset(self) -> socket.socket:
        """Sets answer to IPv4 sockets only (ip_set_core.c: so_set)."""
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def _getsockopt(self, option: int, buffer: bytearray, asked: socket.socket | None = None) -> int:
        # Python's own getsockopt can't pass anything in.
        length = ctypes.c_uint32(len(buffer))
        first = ctypes.byref(ctypes.c_char.from_buffer(buffer))
        level = socket.SOL_IP if asked else self._layout.level
        done = _libc.getsockopt((asked or self._socket).fileno(), level, option, first, ctypes.byref(length))
        return ctypes.get_errno() if done != 0 else 0


def _chain_name(entries: bytearray, at: int) -> str | None:
    """The name of the user's chain that begins with the target at this place; None where none begins.

    The head of a user's chain is an entry with an ERROR target that holds the name; the table ends in another.
    """
    if entries[at + 2 : at + 8] != _ERROR_TARGET:
        return None
    return bytes(entries[at + 32 : at + 62]).split(b"\0", 1)[0].decode(errors="surrogateescape")
