"""Hears the transactions of nf_tables, and makes of them the wake-ups that say who has written.

Law: the writes of ours are told from others' exactly, by the port or process that wrote. What is heard while a pass
runs is kept: the pass may undo what it has not been told of yet, and then asks who it was.
"""

import time
from collections.abc import Callable

import structlog

from nodewalld.core.blame import Wake
from nodewalld.core.events import Culprit
from nodewalld.kernel.culprit import culprit
from nodewalld.kernel.nftables import GenerationEvents

_CULPRITS = 4  # of a burst, the last few are asked for their parents

_log = structlog.get_logger(__name__)


class Witness:
    """For the thread of the loop; `own_ports` gives, once, those of our own writers since the last call."""

    def __init__(self, own_ports: Callable[[], frozenset[int]]) -> None:
        self._own_ports = own_ports
        self._overheard: tuple[Culprit, ...] | None = None
        self.events: GenerationEvents | None = None
        """What to wait on for reading; None where this kernel has no such events, or nobody listens."""

    def listen(self) -> None:
        """Begin to hear."""
        try:
            self.events = GenerationEvents()
        except OSError as error:
            _log.info(f"No nf_tables events from this kernel: {error}")

    def close(self) -> None:
        """Hear no more."""
        if self.events:
            self.events.close()

    def heard(self, noticed: float) -> Wake | None:
        """The transactions since the last turn. After our own we look as well: it costs little, and hides nothing."""
        culprits = self._writers()
        return None if culprits is None else Wake(noticed, culprits, later=self._overhear)

    def overheard(self) -> Wake | None:
        """A further look, when a pass has asked who wrote meanwhile: it may have undone only a part of that."""
        if self._overheard is None:
            return None
        again, self._overheard = Wake(time.monotonic(), self._overheard), None
        return again

    def _overhear(self) -> tuple[Culprit, ...]:
        writers = self._writers()
        if writers is not None:
            self._overheard = (*(self._overheard or ()), *writers)
        return self._overheard or ()

    def _writers(self) -> tuple[Culprit, ...] | None:
        """The last foreign writers of what has been heard since the last time; None when nothing has been."""
        heard = self.events.read() if self.events else None
        if heard is None or not (heard.events or heard.overflow):
            return None
        own = self._own_ports()
        foreign = [event for event in heard.events if event.port_id not in own]
        return tuple(culprit(event) for event in foreign[-_CULPRITS:])
