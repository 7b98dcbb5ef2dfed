"""Which chains the built-in chains lead to, of every table, family and backend: a look around, not a guard's look.

Law: no process and no lock; built-in chains only, so that what neighbours hold behind their jumps costs nothing on nft.
The kernel shows a legacy table only as a whole: a large one is read when its size has changed. Nobody is waited for, so
a rule that others are just writing may not be shown: what is missing once is no news.
"""

import errno
from collections.abc import Iterator

from nodewalld.core.lifelines import Jump
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.xtables import LegacyReader

_ABSENT = frozenset({errno.EINVAL, errno.EPROTONOSUPPORT})  # a kernel without nf_tables, or without netfilter's netlink
_LARGE = 1 << 18  # bytes: a thousand rules or so
_Chains = dict[str, tuple[str, ...]]


class JumpReader:
    """Opens its sockets for each look; remembers what nft showed in a generation, and what large legacy tables did."""

    def __init__(self) -> None:
        self._shown: tuple[int, tuple[Jump, ...]] | None = None
        self._large: dict[tuple[Family, Table], tuple[int, _Chains]] = {}

    def rules(self) -> frozenset[Jump]:
        """What stands in built-in chains: every jump to a chain, and one with the target "" for other rules.

        Raises OSError.
        """
        return frozenset((*self._nft(), *self._legacy()))

    def _nft(self) -> tuple[Jump, ...]:
        try:
            with NftablesReader() as reader:
                generation = reader.generation()
                if self._shown is None or self._shown[0] != generation:
                    self._shown = generation, tuple(self._glance(reader))
        except OSError as error:
            if error.errno in _ABSENT:
                return ()
            raise
        return self._shown[1]

    @staticmethod
    def _glance(reader: NftablesReader) -> Iterator[Jump]:
        for family in Family:
            for table in Table:
                for chain, rules in reader.glance(family, table.value, table.builtin_chains).items():
                    yield from (Jump(Backend.NFT, family, table, chain, rule.jump or "") for rule in rules or ())

    def _legacy(self) -> Iterator[Jump]:
        for family in Family:
            try:
                reader = LegacyReader(family)
            except OSError:
                continue  # a kernel without this family
            with reader:
                tables = reader.tables()
                for table in Table:
                    chains = self._chains(reader, family, table) if table.value in tables else {}
                    for chain, targets in chains.items():
                        yield from (Jump(Backend.LEGACY, family, table, chain, target) for target in targets)

    def _chains(self, reader: LegacyReader, family: Family, table: Table) -> _Chains:
        size = reader.size(table.value)
        if size < _LARGE:
            return reader.jumps(table.value)
        before = self._large.get((family, table))
        if before is None or before[0] != size:
            self._large[family, table] = before = size, reader.jumps(table.value)
        return before[1]
