"""Which backend the node uses: by the chains that kubelet, kube-proxy and Docker leave, else as before, else iptables'.

Law: looking at a legacy table creates it, so only tables that /proc lists are looked at.
"""

from collections.abc import Callable

from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import FirewallError
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.process import ProgramError, run
from nodewalld.kernel.xtables import LegacyReader

# kubelet writes the hint chain for exactly this purpose (KEP-3178); the canaries are older.
_HINTS = (
    (Table.MANGLE, ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-PROXY-CANARY")),
    (Table.NAT, ("DOCKER",)),
    (Table.FILTER, ("DOCKER-USER",)),
)


def evidence() -> tuple[Backend, str] | None:
    """The backend that neighbours use, and the chain that shows it; None when nobody left a trace."""
    for table, names in _HINTS:
        for backend, has_chain in ((Backend.NFT, _nft_has), (Backend.LEGACY, _legacy_has)):
            found = next((name for name in names for f in Family if has_chain(f, table, name)), "")
            if found:
                return backend, found
    return None


def _nft_has(family: Family, table: Table, name: str) -> bool:
    return _asked(lambda: _with_nft(family, table, name))


def _with_nft(family: Family, table: Table, name: str) -> bool:
    with NftablesReader() as reader:
        return reader.chain_exists(family, table.value, name)


def _legacy_has(family: Family, table: Table, name: str) -> bool:
    return _asked(lambda: _with_legacy(family, table, name))


def _with_legacy(family: Family, table: Table, name: str) -> bool:
    with LegacyReader(family) as reader:
        return table.value in reader.tables() and reader.has_chain(table.value, name)


def _asked(question: Callable[[], bool]) -> bool:
    """A kernel without this backend has no trace in it."""
    try:
        return question()
    except OSError:
        return False


def of_tool() -> Backend:
    """What the node's plain `iptables` writes to; raises FirewallError when there is none."""
    try:
        result = run(["iptables", "-V"], timeout=10.0)
    except ProgramError as error:
        raise FirewallError(str(error)) from error
    return Backend.NFT if "nf_tables" in result.stdout else Backend.LEGACY
