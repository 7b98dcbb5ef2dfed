"""One family's rules in one backend, through iptables' own tools: observe and commit, and a cheap fingerprint.

Laws: text comes only from iptables, and what is written without it (`nftbatch`) are bytes that it wrote before; netlink
and getsockopt tell whether text must be read at all. A snapshot that can't be read is an error, never "my rules are
gone". What reads and writes belong together is done in `exclusive`.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.observed import Observed
from nodewalld.core.plan import TablePlan
from nodewalld.core.ruletext import Rule
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.lockwatch import LOCK_FILE, LOCK_FILE_VARIABLE, LockTimeout, XtablesLock
from nodewalld.kernel.nftables import ChainRule, NftablesReader, written_digest
from nodewalld.kernel.nftbatch import Form, NftablesWriter, compose
from nodewalld.kernel.process import ProgramError, Result, installed, run
from nodewalld.kernel.xtables import LegacyReader

_STATUS_BUSY = 4  # RESOURCE_PROBLEM in iptables' xshared.h: the lock was not to be had in time
_STABLE_ATTEMPTS = 5
_CHAINWISE = 4  # chains that are read by a program each
_LARGE = 1 << 18  # bytes of a legacy table: a thousand rules or so
_LOCK_TIMEOUT = 10.0  # seconds to wait for somebody else's xtables lock before saying so and trying again
_CONTENTS_MAX = 20_000  # texts kept by content; neighbours and reloads bring new ones


class FirewallError(Exception):
    """The kernel's rules could not be read or written.

    `busy`: others were writing, so it is worth another try; `fleeting`: at once, it may be over already.
    """

    def __init__(self, text: str, *, busy: bool = False, fleeting: bool = False) -> None:
        super().__init__(text)
        self.busy = busy
        self.fleeting = fleeting


Shallow = Mapping[str, Collection[str]]
"""Chains in which a rule's target is all that matters, each with the targets for which that isn't so."""

NOWHERE: Shallow = {}

Fingerprint = object
"""Compares equal while nothing of ours, nor anything beside it, has changed."""


class Firewall(Protocol):
    """What the reconciler needs of a backend."""

    family: Family
    backend: Backend

    def attend(self, chains: Mapping[Table, Collection[str]]) -> None:
        """Say which chains concern us; whatever was known of them before is read anew."""

    def fingerprint(self, table: Table, chains: Iterable[str]) -> Fingerprint:
        """A value that changes when one of these chains does; starts no process."""

    def observe(self, table: Table, chains: Iterable[str], shallow: Shallow = NOWHERE) -> Observed:
        """These chains, as far as they exist; others may be among them.

        Of foreign rules in the `shallow` ones only the target has to be right, but for the targets named there.
        """

    def glance(self, table: Table, chains: Iterable[str], shallow: Shallow) -> Observed | None:
        """As `observe`, at once; None where a chain is empty, or only a process could tell what is in it.

        For chains of which nothing but rules has changed since they were observed. Nobody is waited for: what is
        planned from this must be committed upon the generation that it is of.
        """

    def observe_all(self, table: Table) -> Observed:
        """Every chain of the table."""

    def own_chains(self, table: Table) -> frozenset[str]:
        """The names of all chains with our prefix; starts no process."""

    def counters(self, table: Table) -> str:
        """The table as iptables-save prints it with packet and byte counters."""

    def tallies(self, table: Table, chains: Iterable[str]) -> dict[str, tuple[tuple[int, int], ...]]:
        """Packets and bytes that each rule of these chains has seen, from the top; starts no process."""

    def commit(self, script: str) -> int:
        """Commit one transaction and return the writer's pid; raises FirewallError with iptables' own words."""

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:
        """Commit a plan; returns the pid or port id by which the writer is known.

        The plan was made from an observation begun at `stamp`. Given that, and where it is possible, no process is
        started; then Stale is raised, and nothing changed, when anybody has written since. Raises FirewallError.
        """

    def stamp(self) -> int:
        """A number that moves by one with each commit of anybody; 0 where nobody counts."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other iptables tools out for a while, where the backend can."""

    def close(self) -> None:
        """Close sockets."""


def tool(family: Family, backend: Backend, action: str = "") -> str:
    """The name of an iptables program of one backend, such as ip6tables-nft-restore."""
    return f"{family.tool}-{backend.value}{'-' if action else ''}{action}"


def require_tools(families: Iterable[Family], backend: Backend) -> None:
    """Raise FirewallError where no family has its tools: nothing at all can be done. One that lacks them harms none."""
    programs = [tool(family, backend, "restore") for family in families]
    if not any(map(installed, programs)):
        raise FirewallError(f"{' and '.join(programs)} {'is' if len(programs) == 1 else 'are'} not installed")


def _is_ours(rule: Rule) -> bool:
    """Whether it is a rule that we may want to write again: a tagged one, or what a `[[jump]]` writes."""
    return bool(rule.tag) or (len(rule.words) == 2 and bool(rule.target))


@lru_cache(maxsize=1024)
def _leading(chain: str | None) -> Rule:
    """A foreign rule of which only its target matters."""
    return Rule(f"-j {chain}" if chain else "")


def parse_chains(text: str) -> dict[str, tuple[Rule, ...]]:
    """The chains of one table as iptables-save or `-S` prints them, with their rules."""
    chains: dict[str, list[Rule]] = {}
    for line in text.splitlines():
        if line.startswith((":", "-N ", "-P ")):
            chains.setdefault(line.lstrip(":").split(" ")[0 if line.startswith(":") else 1], [])
        elif line.startswith("-A "):
            _, name, *rest = line.split(" ", 2)
            chains.setdefault(name, []).append(Rule(rest[0] if rest else ""))
    return {name: tuple(rules) for name, rules in chains.items()}


def parse_tables(text: str) -> dict[Table, dict[str, tuple[Rule, ...]]]:
    """All tables of one family as iptables-save prints them."""
    parts = (part.partition("\n") for part in f"\n{text}".split("\n*")[1:])
    chains = {name: rules for name, _, rules in parts}
    return {table: parse_chains(chains[table]) for table in Table if table in chains}


def saved(family: Family, backend: Backend, timeout: float) -> dict[Table, dict[str, tuple[Rule, ...]]]:
    """Every table that a family has in one backend, read by one process; no table is made by looking.

    Raises FirewallError, also when it takes longer than `timeout` seconds. (iptables-legacy-save without -t goes by
    /proc/net/ip_tables_names, iptables-nft-save by what the kernel lists: iptables/iptables-save.c.)
    """
    return parse_tables(_Tools(family, backend)._run("save", timeout=timeout).stdout)


class _Tools:
    """What both backends share: running the tools and saying what they said."""

    def __init__(self, family: Family, backend: Backend, environment: Mapping[str, str] | None = None) -> None:
        self.family, self.backend = family, backend
        self._environment = environment or {}

    def _run(self, action: str, *arguments: str, stdin: str = "", timeout: float = 25.0) -> Result:
        name = tool(self.family, self.backend, action)
        # Within the limit that the watchdog grants a pass: kube-proxy's own commits can hold the kernel for 12 s.
        try:
            result = run([name, *arguments], stdin=stdin, env=self._environment, timeout=timeout)
        except ProgramError as error:
            raise FirewallError(str(error)) from error
        if result.status or "incompatible, use 'nft' tool" in result.stdout + result.stderr:
            raise self._error(name, result)
        return result

    @staticmethod
    def _error(name: str, result: Result) -> FirewallError:
        said = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        words = "; ".join(line for line in said if not line.startswith("Try `"))[:1000]
        text = f"{name}: {words or f'ended with status {result.status}'}"
        return FirewallError(text, busy=result.status == _STATUS_BUSY)

    def _save(self, table: Table) -> dict[str, tuple[Rule, ...]]:
        return parse_chains(self._run("save", "-t", table.value).stdout)

    def counters(self, table: Table) -> str:
        """The table as iptables-save prints it with packet and byte counters."""
        return self._run("save", "-c", "-t", table.value).stdout


@dataclass(frozen=True, slots=True)
class _Known:
    """The text of a rule that a handle stands for."""

    digest: bytes
    rule: Rule


class NftFirewall(_Tools):
    """iptables-nft. The text of a rule is read once; a chain without unknown rules costs no process.

    A rule is known by its handle, and by its content: what is written anew after a flush, by us or by a neighbour that
    writes the same rules at each of its starts, has new handles, but the same expressions. A rule that was once seen in
    force can be written again without a process.
    """

    def __init__(self, family: Family, reader: NftablesReader) -> None:
        super().__init__(family, Backend.NFT)
        self._reader = reader
        self._texts: dict[tuple[Table, str], dict[int, _Known]] = {}
        self._contents: dict[tuple[Table, bytes], Rule] = {}
        self._forms: dict[tuple[str, ...], Form] = {}

    @cached_property
    def _writer(self) -> NftablesWriter:
        return NftablesWriter()

    def stamp(self) -> int:
        return self._reader.generation()

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._reader.close()
        if "_writer" in self.__dict__:
            self._writer.close()

    def attend(self, chains: Mapping[Table, Collection[str]]) -> None:
        self._reader.attend({(self.family, table.value): names for table, names in chains.items()})

    def fingerprint(self, table: Table, chains: Iterable[str]) -> Fingerprint:
        return tuple(self._reader.look(self.family, table.value, sorted(chains)).values())

    def own_chains(self, table: Table) -> frozenset[str]:
        return frozenset(self._reader.chains(self.family, table.value, OWN_PREFIX))

    def observe(self, table: Table, chains: Iterable[str], shallow: Shallow = NOWHERE) -> Observed:
        chains_read, handles = {}, {}
        looked = self._reader.look(self.family, table.value, sorted(chains))
        self._learn_many(table, looked, shallow)
        for name, rules in looked.items():
            held = self._chain(table, name, rules, shallow.get(name))
            if held is not None:
                chains_read[name], handles[name] = held
        return Observed(chains_read, handles)

    def glance(self, table: Table, chains: Iterable[str], shallow: Shallow) -> Observed | None:
        read, handles = {}, {}
        for name in chains:
            held = self._reader.follow(self.family, table.value, name) or ()
            rules = [rule for rule in self._known(table, name, held, shallow.get(name)) if rule is not None]
            if not held or len(rules) < len(held):
                return None
            read[name], handles[name] = tuple(rules), tuple([rule.handle for rule in held])
        return Observed(read, handles)

    def observe_all(self, table: Table) -> Observed:
        chains = self._save(table)
        if not chains and self._reader.chains(self.family, table.value):
            raise FirewallError(f"{tool(self.family, self.backend, 'save')} shows nothing of table {table}")
        return Observed(chains)

    def _learn_many(self, table: Table, looked: Mapping[str, tuple[ChainRule, ...] | None], shallow: Shallow) -> None:
        """Where many chains hold what was never seen, as when a daemon starts, read them all by one program.

        Not in nat, where others may have a hundred thousand rules.
        """
        new = {
            name: held
            for name, held in looked.items()
            if held and None in self._known(table, name, held, shallow.get(name))
        }
        if len(new) <= _CHAINWISE or table is Table.NAT:
            return
        read = parse_chains(self._run("", "-t", table.value, "-S").stdout)
        after = self._reader.look(self.family, table.value, new)
        for name, held in new.items():
            if after[name] == held and len(read.get(name, ())) == len(held):
                self._learn(table, name, held, read[name])

    def _chain(
        self, table: Table, name: str, held: tuple[ChainRule, ...] | None, deep: Collection[str] | None
    ) -> tuple[tuple[Rule, ...], tuple[int, ...]] | None:
        """The rules of a chain that the kernel shows so, and their handles."""
        for _ in range(_STABLE_ATTEMPTS):
            if held is None:
                self._texts.pop((table, name), None)
                return None
            found = self._known(table, name, held, deep)
            handles = tuple(rule.handle for rule in held)
            if None not in found:
                return tuple(rule for rule in found if rule is not None), handles
            read, shown = self._listed(table, name), held
            held = self._reader.rules(self.family, table.value, name)
            # The same handles before and after: what was printed between is of just these rules.
            if read is not None and len(read) == len(shown) and held == shown:
                self._learn(table, name, shown, read)
                return read, handles
        words = f"chain {name} of table {table} changes faster than it can be read"
        raise FirewallError(words, busy=True, fleeting=True)

    def _known(
        self, table: Table, name: str, held: Iterable[ChainRule], deep: Collection[str] | None
    ) -> list[Rule | None]:
        """What rules of a chain say, where it is known, or their target is enough and not a `deep` one (None: all)."""
        texts, found = self._texts.get((table, name), {}), list[Rule | None]()
        for rule in held:
            known = texts.get(rule.handle)
            if known and known.digest == rule.digest:
                found.append(known.rule)
                continue
            said = self._contents.get((table, rule.digest)) if not rule.looks_up else None
            enough = said is None and deep is not None and not rule.tagged and rule.jump not in deep
            found.append(_leading(rule.jump) if enough else said)
        return found

    def _listed(self, table: Table, name: str) -> tuple[Rule, ...] | None:
        result = self._run("", "-t", table.value, "-S", name)
        return parse_chains(result.stdout).get(name)

    def _learn(self, table: Table, name: str, held: tuple[ChainRule, ...], read: tuple[Rule, ...]) -> None:
        pairs = zip(held, read, strict=True)
        self._texts[table, name] = {rule.handle: _Known(rule.digest, text) for rule, text in pairs}
        if len(self._contents) > _CONTENTS_MAX:
            self._contents.clear()
        pairs = zip(held, read, strict=True)
        self._contents.update({(table, rule.digest): text for rule, text in pairs if not rule.looks_up})
        words = {rule.handle: text for rule, text in zip(held, read, strict=True) if _is_ours(text)}
        forms = self._reader.forms(self.family, table.value, name) if words else {}
        for handle in forms.keys() & words.keys():
            self._forms[words[handle].words] = forms[handle]
            self._contents[table, written_digest(forms[handle])] = words[handle]  # once written so, it is known at once

    def tallies(self, table: Table, chains: Iterable[str]) -> dict[str, tuple[tuple[int, int], ...]]:
        return {name: self._reader.tallies(self.family, table.value, name) for name in chains}

    def commit(self, script: str) -> int:
        return self._run("restore", "--noflush", stdin=script).pid

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:
        requests = compose(self.family, planned.table, planned.steps, observed.handles, self._forms) if stamp else None
        if requests:
            with suppress(OSError):  # what the kernel refuses, the tool may find words for
                return self._writer.commit(requests, stamp)
        return self.commit(planned.script)


class LegacyFirewall(_Tools):
    """iptables-legacy. Reading, deciding and writing happen under the xtables lock, so that nothing comes between.

    The text of a rule is read once: of a table in which nothing new stands the kernel's own bytes tell it all.
    """

    def __init__(self, family: Family, private_lock: Path, lock_timeout: float, lock_file: str = LOCK_FILE) -> None:
        super().__init__(family, Backend.LEGACY, {LOCK_FILE_VARIABLE: str(private_lock)})
        self._lock = XtablesLock(os.environ.get(LOCK_FILE_VARIABLE, lock_file))
        self._lock_timeout = lock_timeout
        self._own: dict[Table, tuple[int, frozenset[str]]] = {}
        self._contents: dict[bytes, Rule] = {}

    @cached_property
    def _reader(self) -> LegacyReader:
        """Opened when it is first needed: a kernel without IPv6 refuses even the socket."""
        return LegacyReader(self.family)

    def stamp(self) -> int:
        return 0

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        try:
            with self._lock.acquire(self._lock_timeout):
                yield
        except LockTimeout as error:
            raise FirewallError(error.strerror or str(error), busy=True) from error

    def close(self) -> None:
        if "_reader" in self.__dict__:
            self._reader.close()

    def attend(self, chains: Mapping[Table, Collection[str]]) -> None:
        """Whole tables are read here."""

    def fingerprint(self, table: Table, chains: Iterable[str]) -> Fingerprint:  # noqa: ARG002 - see Firewall
        return self._reader.fingerprint(table.value)

    def own_chains(self, table: Table) -> frozenset[str]:
        """Read anew when the table is small, or has changed its size: a large one takes the kernel long to show."""
        size = self._reader.size(table.value)
        before = self._own.get(table)
        if before is None or before[0] != size or size < _LARGE:
            names = frozenset(name for name in self._reader.chains(table.value) if name.startswith(OWN_PREFIX))
            self._own[table] = before = size, names
        return before[1]

    def observe(
        self,
        table: Table,
        chains: Iterable[str],  # noqa: ARG002 - see Firewall
        shallow: Shallow = NOWHERE,  # noqa: ARG002
    ) -> Observed:
        return self.observe_all(table)

    def glance(self, table: Table, chains: Iterable[str], shallow: Shallow) -> None:
        """Nothing can be written here without the lock, and without reading the whole table."""

    def observe_all(self, table: Table) -> Observed:
        size = self._reader.size(table.value)
        if not size:
            return Observed({})
        said = self._reader.rules(table.value) if size < _LARGE else None
        if said is None:
            return Observed(self._save(table))
        known = self._contents
        if not all(digest in known for rules in said.values() for digest in rules):
            self._learn(said, read := self._save(table), steady=self._reader.rules(table.value) == said)
            return Observed(read)
        return Observed({name: tuple([known[digest] for digest in rules]) for name, rules in said.items()})

    def _learn(self, said: Mapping[str, Sequence[bytes]], read: Mapping[str, Sequence[Rule]], *, steady: bool) -> None:
        """Remember how the tool prints what the kernel said, if nobody has gone round the lock meanwhile."""
        if len(self._contents) > _CONTENTS_MAX:
            self._contents.clear()
        if steady and {name: len(rules) for name, rules in said.items()} == {n: len(r) for n, r in read.items()}:
            for name, rules in said.items():
                self._contents.update(zip(rules, read[name], strict=True))

    def tallies(self, table: Table, chains: Iterable[str]) -> dict[str, tuple[tuple[int, int], ...]]:
        found = self._reader.tallies(table.value)
        return {name: found.get(name, ()) for name in chains}

    def commit(self, script: str) -> int:
        return self._run("restore", "--noflush", stdin=script).pid

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:  # noqa: ARG002 - see Firewall
        return self.commit(planned.script)


def open_firewall(family: Family, backend: Backend, runtime_dir: Path) -> Firewall:
    """The rules of one family in one backend; `runtime_dir` is for our own tools' lock file."""
    if backend is Backend.NFT:
        return NftFirewall(family, NftablesReader())
    return LegacyFirewall(family, runtime_dir / "xtables.lock", _LOCK_TIMEOUT)
