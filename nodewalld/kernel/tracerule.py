"""The rule of iptables that has packets traced, where one is needed, and its end, whatever dies.

It is needed for the legacy backend, and for nf_tables in kernels before 5.12. Three things end it:
1. Its keeper: a process of its own that writes the rule and takes it out as soon as the command that asked for it has
   ended, in whatever way; the keeper outlives the command, its terminal and its signals.
2. The daemon, at its start and at each resync, and the next trace: `sweep` takes out each rule whose command is no
   more. The tag names a netlink port that is open while the command lives, so no file and no process id is trusted.
3. Its time: an end stands in the rule itself, from which on it does nothing.

Law: the rule's tag is the only record. It says which logger was there before, so the logger is changed after the rule
was written, and put back before the rule is taken out.
"""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

from nodewalld.core.ruletext import TAG_PREFIX, split
from nodewalld.core.tracing.traffic import TAG, Traffic, left_by, word_of
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import parse_chains, tool
from nodewalld.kernel.legacylog import NFLOG, NONE, logger, set_logger
from nodewalld.kernel.listening import is_open
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.process import ProgramError, run
from nodewalld.kernel.xtables import LegacyReader

_RAW = Table.RAW.value
_NEEDLE = (TAG_PREFIX + TAG).encode()
_NO_LOGGER = "-"  # of a rule for which none had to be changed
_GRACE = timedelta(seconds=5)
_WAIT, _WAIT_TO_READ = "10", "1"  # seconds for the xtables lock; all of a sweep is one pass of the daemon


class TraceRuleError(Exception):
    """iptables did not take the rule; the text is fit for people."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A trace's rule: where it is or is to be, and what its tag says: the port, and the logger before."""

    family: Family
    backend: Backend
    chain: str
    words: tuple[str, ...]
    port: int
    before: str

    def insert(self) -> None:
        """Write it on top of its chain, then choose the logger. Raises TraceRuleError or OSError."""
        self._iptables("-I", self.chain, "1", *self.words)
        if self.backend is Backend.LEGACY:
            set_logger(self.family, NFLOG)

    def take_out(self) -> None:
        """Put the logger back, then take the rule out. Raises TraceRuleError or OSError."""
        if self.before != _NO_LOGGER and logger(self.family) == NFLOG:
            try:
                set_logger(self.family, self.before)
            except OSError:  # its module has gone, or a sandbox forbids it
                set_logger(self.family, NONE)
        self._iptables("-D", self.chain, *self.words)

    def _iptables(self, *arguments: str) -> None:
        try:
            result = run([tool(self.family, self.backend), "-w", _WAIT, "-t", _RAW, *arguments])
        except ProgramError as error:
            raise TraceRuleError(str(error)) from error
        if result.status:
            raise TraceRuleError(f"{tool(self.family, self.backend)}: {result.stderr.strip()}")


class TraceRule:
    """Keeps rules in place, in one backend, until it is closed or its process ends. Raises TraceRuleError.

    `port` is a netlink port that is open until then, `seconds` the longest that it is meant to be.
    """

    def __init__(
        self, traffic: Traffic, backend: Backend, families: Iterable[Family], port: int, seconds: float
    ) -> None:
        until = datetime.now(UTC) + timedelta(seconds=seconds) + _GRACE
        self._rules = []
        for family in families:
            before = logger(family) if backend is Backend.LEGACY else _NO_LOGGER
            words = tuple(traffic.rule(family, word_of(port, before), until))
            self._rules.append(_Placed(family, backend, traffic.hook, words, port, before))
        theirs, self._hold = os.pipe2(os.O_CLOEXEC)
        hear, told = os.pipe2(os.O_CLOEXEC)
        self._keeper = os.fork()
        if self._keeper == 0:
            _keep(self._rules, theirs, told)
        os.close(theirs)
        os.close(told)
        with os.fdopen(hear, encoding="utf-8") as answer:
            words_of_keeper = answer.read()
        if words_of_keeper != "ready":
            self.close()
            raise TraceRuleError(words_of_keeper or "the process that keeps the rule was killed")

    def close(self) -> None:
        """Let the keeper take its rules out, and wait for that."""
        os.close(self._hold)
        _, status = os.waitpid(self._keeper, 0)
        if status:  # somebody killed it
            _take_out(self._rules)


def _keep(rules: list[_Placed], until: int, told: int) -> NoReturn:
    """The keeper's life. It has nothing of its parent's but the two pipes: neither terminal nor sockets."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        _close_all_but(until, told)
        try:
            for rule in rules:
                rule.insert()
            os.write(told, b"ready")
        except (TraceRuleError, OSError) as error:
            os.write(told, str(error).encode(errors="replace"))
        os.close(told)
        while os.read(until, 1):
            pass
        _take_out(rules)
        status = 0
    finally:
        os._exit(status)


def _close_all_but(*kept: int) -> None:
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # the folder's own, which was closed with it
                os.close(number)


def _take_out(rules: Iterable[_Placed]) -> int:
    """Take out what is there of these; returns how many were."""
    done = 0
    for rule in rules:
        with contextlib.suppress(TraceRuleError, OSError):  # the rule that isn't there, or a family that isn't
            rule.take_out()
            done += 1
    return done


def sweep() -> int:
    """Take out the rules of traces whose command is no more; returns how many. Starts no process if there are none."""
    return _take_out(rule for rule in _found() if not is_open(rule.port))


def _found() -> Iterator[_Placed]:
    for family in Family:
        for backend, look in ((Backend.LEGACY, _in_legacy), (Backend.NFT, _in_nft)):
            with contextlib.suppress(OSError, ProgramError):  # a kernel without this family or backend holds none
                for chain in Table.RAW.builtin_chains if look(family) else ():
                    yield from _rules_of(family, backend, chain)


def _in_legacy(family: Family) -> bool:
    with LegacyReader(family) as reader:
        return reader.mentions(_RAW, _NEEDLE)


def _in_nft(family: Family) -> bool:
    with NftablesReader() as reader:
        return reader.mentions(family, _RAW, _NEEDLE)


def _rules_of(family: Family, backend: Backend, chain: str) -> Iterator[_Placed]:
    result = run([tool(family, backend), "-w", _WAIT_TO_READ, "-t", _RAW, "-S", chain])
    for rule in parse_chains(result.stdout).get(chain, ()):
        left = left_by(rule.tag)
        if left:
            yield _Placed(family, backend, chain, tuple(split(rule.text)), *left)
