"""What disturbs, and looks at the clock, inside a node: `python -m bench.worker WHAT COUNT`; prints JSON.

Laws: our jump is deleted, not displaced, so that no disturbance is taken for a war. Events are heard, never polled for,
but on legacy, which has none.
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable

from nodewalld.core.words import Family
from nodewalld.kernel.netlink import NFPROTO, NLM_F_APPEND, NLM_F_CREATE, U64, attribute, netfilter_body, text
from nodewalld.kernel.nftables import GenerationEvents, NftablesReader
from nodewalld.kernel.nftbatch import NftablesWriter, Request
from nodewalld.kernel.xtables import LegacyReader

TABLE, CHAIN = "mangle", "PREROUTING"
_PAUSE = 0.01  # seconds between two disturbances
_LIMIT = 10.0


def _messages(table: str, chain: str) -> bytes:
    return netfilter_body(NFPROTO[Family.IPV4], text(1, table), text(2, chain))


class _Nft:
    """Deletes our jump, and hears when it is back."""

    def __init__(self) -> None:
        self._events, self._reader, self._writer = GenerationEvents(), NftablesReader(), NftablesWriter()

    def _next(self) -> None:
        if not select.select([self._events], [], [], _LIMIT)[0]:
            raise TimeoutError("nothing was heard")

    def tool(self) -> float:
        """From the event of iptables' deletion to the event of the repair."""
        self._events.read()
        with subprocess.Popen(["iptables-nft", "-t", TABLE, "-D", CHAIN, "1"]) as process:
            seen: list[float] = []
            while len(seen) < 2:
                self._next()
                now = time.perf_counter()
                seen += [now for _ in self._events.read().events]
            process.wait()
        return seen[1] - seen[0]

    def raw(self) -> float:
        """From the end of a deletion through an open socket to the event of the repair."""
        self._events.read()
        (first, *_) = self._reader.rules(Family.IPV4, TABLE, CHAIN) or ()
        body = _messages(TABLE, CHAIN) + attribute(3, U64.pack(first.handle))
        self._writer.commit([(0xA08, 0, body)], self._reader.generation())
        begun, heard = time.perf_counter(), 0
        while heard < 2:
            self._next()
            heard += len(self._events.read().events)
        return max(0.0, time.perf_counter() - begun)

    def noise(self) -> float:
        """A foreign transaction that does not concern us."""
        rule: Request = (0xA06, NLM_F_CREATE | NLM_F_APPEND, _messages("filter", "NOISE"))
        self._writer.commit([rule], 0)
        return 0.0

    def reference(self) -> float:
        """One iptables-nft-restore that moves a jump."""
        script = "*mangle\n-D OUTPUT -j MOVED\n-I OUTPUT -j MOVED\nCOMMIT\n"
        return _timed(["iptables-nft-restore", "--noflush"], script)


class _Legacy:
    """Deletes our jump, and looks until the table is as it was."""

    def __init__(self) -> None:
        self._reader = LegacyReader(Family.IPV4)
        self._good = self._reader.fingerprint(TABLE)

    def tool(self) -> float:
        """From the deleting tool's exit to the repair."""
        subprocess.run(["iptables-legacy", "-w", "-t", TABLE, "-D", CHAIN, "1"], check=True)
        begun = time.perf_counter()
        while self._reader.fingerprint(TABLE) != self._good:
            if time.perf_counter() > begun + _LIMIT:
                raise TimeoutError("our jump did not come back")
        return time.perf_counter() - begun

    @staticmethod
    def reference() -> float:
        """One iptables-legacy-restore that moves a jump."""
        return _timed(
            ["iptables-legacy-restore", "--noflush", "-w"], "*raw\n-D OUTPUT -j MOVED\n-I OUTPUT -j MOVED\nCOMMIT\n"
        )


def _timed(command: list[str], script: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, input=script, text=True, check=True)
    return time.perf_counter() - begun


def main() -> None:
    """See the module."""
    backend, what, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    disturber = _Nft() if backend == "nft" else _Legacy()
    act: Callable[[], float] = getattr(disturber, what)
    seconds = []
    for _ in range(count):
        seconds.append(act())
        time.sleep(_PAUSE)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
