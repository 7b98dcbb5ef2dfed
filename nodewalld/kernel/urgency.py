"""Goes before other programs for the moments in which a packet may pass: while waiting, and for the first answer.

Laws: never for longer. All work that may take its time is done like anybody else's, or a storm of events would hold up
the node. And never required: where the system grants no real-time priority, everything goes on without it. What is
started from here has none.

Sources: sched(7), for the real-time policies, RLIMIT_RTPRIO (who has no CAP_SYS_NICE may rise that far), and
SCHED_RESET_ON_FORK (which may not be given up again).
"""

import gc
import os

_PRIORITY = 1  # the lowest: what the system itself has made real-time goes before us


class Urgency:
    """For the thread that it is made in."""

    def __init__(self) -> None:
        self._usual = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
        self._granted = self._usual == os.SCHED_OTHER  # else somebody has chosen for us
        self._frozen = self._urgent = False

    def begin(self) -> None:
        """Be urgent until `end`."""
        if not self._frozen:
            # What is there by now stays: to go through all of it again and again would hold answers up for 25 ms.
            gc.collect()
            gc.freeze()
            self._frozen = True
        if not self._urgent:
            self._take(os.SCHED_RR, _PRIORITY)
            self._urgent = True

    def end(self) -> None:
        """Be no more urgent than others."""
        if self._urgent:
            self._take(self._usual, 0)
            self._urgent = False

    def _take(self, policy: int, priority: int) -> None:
        if self._granted:
            try:
                os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
            except OSError:  # EPERM, or a seccomp filter's errno
                self._granted = False
