"""A survey of the node for lints: rules, addresses, sets; as much as whoever asks may see.

Law: nothing is changed, and no table made by looking; each part that can't be read is told and the others still are.
The time is bounded: one process a family, and each within its limit.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from nodewalld.core.environment import Environment
from nodewalld.core.lints.facts import Chains, NodeFacts
from nodewalld.core.lockout import Connection
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import FirewallError, saved
from nodewalld.kernel.links import SERVICE_INTERFACE, Links
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.paths import observe_paths
from nodewalld.kernel.sets import Sets
from nodewalld.kernel.xtables import LegacyReader

_READ_TIMEOUT = 30.0  # seconds; 100,000 rules take iptables-nft-save 1.8.9 nine, iptables-legacy-save half a one


def survey(
    families: Iterable[Family], backend: Callable[[], Backend], set_names: Iterable[str], connection: Connection | None
) -> NodeFacts:
    """The node as it is now; `set_names` are the kernel sets whose type matters."""
    unread: list[str] = []
    families = tuple(families)
    environment, ipvs = _links(unread)
    rules, elsewhere = _rules(families, backend, unread)
    sets = _sets(set_names, unread)
    paths = observe_paths(())
    read = tuple(dict.fromkeys(unread))
    return NodeFacts(environment, rules, sets, ipvs or paths.ipvs, connection, read, paths, elsewhere)


def _links(unread: list[str]) -> tuple[Environment, bool]:
    try:
        with Links() as links:
            state = links.snapshot()
    except OSError as error:
        unread.append(str(error))
        return Environment(), False
    return state.environment, SERVICE_INTERFACE in state.interfaces


def _rules(
    families: tuple[Family, ...], backend: Callable[[], Backend], unread: list[str]
) -> tuple[dict[Family, dict[Table, Chains]], dict[Family, dict[Table, frozenset[str]]]]:
    """The rules in the backend that is used, and the names of the chains in the other one."""
    try:
        chosen = backend()
        with ThreadPoolExecutor(len(families)) as pool:
            asked = {family: pool.submit(saved, family, chosen, _READ_TIMEOUT) for family in families}
    except (FirewallError, OSError) as error:
        unread.append(str(error))
        return {}, {}
    found: dict[Family, dict[Table, Chains]] = {}
    for family, future in asked.items():
        try:
            found[family] = dict(future.result())
        except FirewallError as error:
            unread.append(str(error))
    other = Backend.LEGACY if chosen is Backend.NFT else Backend.NFT
    return found, {family: _chain_names(family, other) for family in found}


def _chain_names(family: Family, backend: Backend) -> dict[Table, frozenset[str]]:
    """The chains of every table; of a kernel without this backend none."""
    try:
        if backend is Backend.NFT:
            with NftablesReader() as nft:
                return {table: frozenset(nft.chains(family, table.value)) for table in Table}
        with LegacyReader(family) as legacy:
            return {table: frozenset(legacy.chains(table.value)) for table in Table}
    except OSError:
        return {}


def _sets(names: Iterable[str], unread: list[str]) -> dict[str, tuple[str, Family | None]]:
    try:
        with Sets() as sets:
            headers = {name: sets.header(name) for name in names}
    except OSError as error:
        unread.append(str(error))
        return {}
    return {name: (header.type_name, header.family) for name, header in headers.items() if header}
