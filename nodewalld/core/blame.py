"""Why the reconciler looks; whom to name for a repair or a contention, and in which words."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from nodewalld.core.events import Contention, Culprit, Event, Kind, Reason, duration, place
from nodewalld.core.pacing import Contest
from nodewalld.core.plan import Change
from nodewalld.core.ruletext import target_of
from nodewalld.core.words import Family, Table


@dataclass(frozen=True, slots=True)
class Wake:
    """Why the reconciler looks: when it was noticed (monotonic), and where it must look (None: everywhere).

    `touched` are the chains, known to be all, that the transactions up to `generation` have touched; none when that
    isn't known.
    `who` asks for those who are known to have written; `later` for those who have meanwhile, when it was none of them.
    Both read /proc, and are asked only when something of ours is wrong.
    """

    noticed: float
    exact: bool = True
    where: frozenset[tuple[Family, Table]] | None = None
    touched: frozenset[tuple[Family, Table, str]] = frozenset()
    generation: int = 0
    who: Callable[[], tuple[Culprit, ...]] = tuple
    later: Callable[[], tuple[Culprit, ...]] = tuple


def suspects(culprits: Sequence[Culprit], family: Family) -> tuple[Culprit, ...]:
    """The writers whose tools can have written to this family; several may have written before we looked."""
    other = (Family.IPV6 if family is Family.IPV4 else Family.IPV4).tool
    return tuple(culprit for culprit in culprits if not culprit.comm.startswith(other)) or tuple(culprits)


def contention(family: Family, contest: Contest, yield_to: Sequence[str], age: float) -> Contention:
    """A contest as it is told of; `age` is how long ago it began, in seconds."""
    return Contention(
        family=family,
        table=contest.table,
        chain=contest.chain,
        what=contended(family, contest, yield_to),
        repairs=contest.rounds,
        since=datetime.now(UTC) - timedelta(seconds=age),
        by=contest.by,
        takers=contest.takers,
    )


def contended(family: Family, contest: Contest, yield_to: Sequence[str]) -> str:
    """What to say of a contention: where, who, how often, what we do, and what would end it."""
    where = place(family, contest.table, contest.chain)
    who = contest.by.name if contest.by else "another program"
    often = f"{contest.rounds} times in {duration((contest.last - contest.since) * 1000)}"
    if not contest.takers:
        return f"{where}: {who} takes our jump out again and again, {often}; it is put back at once each time"
    target = target_of(contest.takers[0])
    rule = f"the jump to {target}" if "-" in target and len(contest.takers) == 1 else _rules(len(contest.takers))
    pace = f"at most every {contest.wait:g} s" if contest.slowed and contest.wait else "at once"
    return (
        f"{where}: {who} puts {rule} in the place of our jump again and again, {often}; ours is put back {pace}. "
        f"What would end it: {', or '.join(_cures(contest.table, target, yield_to))}"
    )


def _rules(number: int) -> str:
    return "a rule" if number == 1 else f"{number} rules"


def _cures(table: Table, target: str, yield_to: Sequence[str]) -> Iterator[str]:
    if any(fnmatch.fnmatchcase(target, glob) for glob in yield_to):
        yield 'position = "early"'
    elif "-" in target:  # a chain, and no target of iptables' own
        yield f'position = "early" with "{target}" in daemon.yield_to'
    else:
        yield "another position"
    if target.startswith("cali-"):
        yield "ChainInsertMode: Append in Calico's FelixConfiguration"
    if table is Table.FILTER:
        yield "a rule in mangle instead"


def contention_events(before: Sequence[Contention], now: Sequence[Contention]) -> Iterator[Event]:
    """What to tell of contentions that have begun, and of those that are over."""
    known, still = ({contest.identity for contest in each} for each in (before, now))
    for contest in now:
        if contest.identity not in known:
            yield _event(Kind.CONTENTION, f"contention in {contest.what}", contest)
    for contest in before:
        if contest.identity not in still:
            who = contest.by.name if contest.by else "the other program"
            where = place(contest.family, contest.table, contest.chain)
            what = f"contention in {where} is over after {contest.repairs} rounds: {who} leaves our jump alone"
            yield _event(Kind.PEACE, what, contest)


def _event(kind: Kind, what: str, contest: Contention) -> Event:
    return Event(
        time=datetime.now(UTC),
        kind=kind,
        what=what,
        family=contest.family,
        table=contest.table,
        chain=contest.chain,
        reason=None if kind is Kind.PEACE else Reason.DISPLACED if contest.takers else Reason.MISSING,
        by=contest.by,
    )


def subjects(changes: Sequence[Change]) -> str:
    """What was put right, in a few words."""
    return changes[0].subject if len(changes) == 1 else f"{changes[0].subject} and {len(changes) - 1} more"
