"""A trace of real packets: what has them traced, and what the kernel tells of them, in every backend that is in use.

Laws: it listens before anything is traced, and stops tracing before it stops listening. A backend without a single
table is left alone: looking there would tell nothing, and make tables. Nothing that has packets traced outlives the
process (`nfttrace`, `tracerule`).
"""

import errno
from collections.abc import Iterator
from contextlib import ExitStack

from nodewalld.core.tracing.path import Sighting
from nodewalld.core.tracing.traffic import Traffic
from nodewalld.core.words import Backend, Family
from nodewalld.kernel import nfttrace
from nodewalld.kernel.closing import Closing
from nodewalld.kernel.legacylog import LegacyLog, Taken
from nodewalld.kernel.nfttrace import NoOwner, TraceEvents, TraceTable
from nodewalld.kernel.tracerule import TraceRule, sweep
from nodewalld.kernel.xtables import LegacyReader


class NoRules(Exception):
    """There is no table that a packet could meet."""


class Trace(Closing):
    """Has packets traced until it is closed. Raises NoRules, Taken, TraceRuleError, NetlinkError or OSError.

    `start` is the table of nf_tables in which a trace begins, "" where there is none; `legacy` are the families whose
    legacy tables are heard; `missed` says why another backend isn't. `seconds` is the longest that it is meant to last.
    """

    def __init__(self, traffic: Traffic, seconds: float) -> None:
        self.start, self.missed = "", ""
        self.lost = False
        self.legacy: tuple[Family, ...] = ()
        self._sources: list[TraceEvents | LegacyLog] = []
        with ExitStack() as stack:
            sweep()
            legacy = tuple(family for family in traffic.families if _has_legacy(family))
            nft = nfttrace.used()
            if not nft and not legacy:
                raise NoRules
            if nft:
                self._trace_nft(traffic, seconds, stack)
            if legacy:
                try:
                    self._trace_legacy(traffic, legacy, seconds, stack)
                except Taken as error:
                    if not nft:
                        raise
                    self.missed = str(error)
            self._stack = stack.pop_all()

    def _trace_nft(self, traffic: Traffic, seconds: float, stack: ExitStack) -> None:
        events = TraceEvents()
        stack.callback(events.close)
        try:
            table = TraceTable(traffic)
        except NoOwner:
            stack.callback(TraceRule(traffic, Backend.NFT, traffic.families, events.port, seconds).close)
        else:
            stack.callback(table.close)
            self.start = table.name
        self._sources.append(events)

    def _trace_legacy(self, traffic: Traffic, families: tuple[Family, ...], seconds: float, stack: ExitStack) -> None:
        log = LegacyLog()
        stack.callback(log.close)
        stack.callback(TraceRule(traffic, Backend.LEGACY, families, log.port, seconds).close)
        self._sources.append(log)
        self.legacy = families

    def filenos(self) -> list[int]:
        """The descriptors to wait on for reading."""
        return [source.fileno() for source in self._sources]

    def read(self) -> Iterator[Sighting]:
        """Everything that has been heard since the last read, without waiting; `lost` tells that there was more."""
        for source in self._sources:
            try:
                yield from source.read()
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost = True

    def close(self) -> None:
        """End the trace; nothing of it is left afterwards."""
        self._stack.close()


def _has_legacy(family: Family) -> bool:
    try:
        with LegacyReader(family) as reader:
            return bool(reader.tables())
    except OSError:  # a kernel without IPv6
        return False
