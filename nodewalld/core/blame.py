"""Why the reconciler looks; whom to name for a repair or a contention, and in which words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nodewalld.core.events import Culprit
from nodewalld.core.plan import Change
from nodewalld.core.words import Family, Table


@dataclass(frozen=True, slots=True)
class Wake:
    """Why the reconciler looks: when it was noticed (monotonic), and where it must look (None: everywhere).

    `who` asks for those who are known to have written; `later` for those who have meanwhile, when it was none of them.
    Both read /proc, and are asked only when something of ours is wrong.
    """

    noticed: float
    exact: bool = True
    where: frozenset[tuple[Family, Table]] | None = None
    who: Callable[[], tuple[Culprit, ...]] = tuple
    later: Callable[[], tuple[Culprit, ...]] = tuple


def blame(culprits: Sequence[Culprit], family: Family) -> Culprit | None:
    """The last writer whose tool can have written to this family; several may have written before we looked."""
    other = (Family.IPV6 if family is Family.IPV4 else Family.IPV4).tool
    fitting = [culprit for culprit in culprits if not culprit.comm.startswith(other)]
    return next(iter((fitting or list(culprits))[-1:]), None)


def contended(table: Table, chain: str, by: Culprit | None, wait: float) -> str:
    """What to say of a contention, and what would end it; `wait` in seconds."""
    who = f"{by.name} takes" if by else "another program takes"
    return (
        f"{who} the place of our jump in {table} {chain} again and again; we now put it back every {wait:g} s. "
        'Position "early", Calico\'s ChainInsertMode: Append, or a rule in mangle instead would end it'
    )


def subjects(changes: Sequence[Change]) -> str:
    """What was put right, in a few words."""
    return changes[0].subject if len(changes) == 1 else f"{changes[0].subject} and {len(changes) - 1} more"
