"""Which backend the node uses: by the chains that kubelet, kube-proxy and Docker leave, else as before, else iptables'.

Law: looking at a legacy table creates it, so only tables that /proc lists are looked at.
"""

import contextlib
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
    with contextlib.ExitStack() as stack:
        lookers = {backend: _looker(backend, stack) for backend in Backend}
        for table, names in _HINTS:
            for backend in (Backend.NFT, Backend.LEGACY):
                found = next((n for n in names for f in Family if lookers[backend](f, table.value, n)), "")
                if found:
                    return backend, found
    return None


def _looker(backend: Backend, stack: contextlib.ExitStack) -> Callable[[Family, str, str], bool]:
    """Whether a chain is there, asked through sockets opened once; a kernel without this backend has no trace in it."""
    readers: dict[Family, LegacyReader] = {}

    def legacy(family: Family, table: str, name: str) -> bool:
        if family not in readers:
            readers[family] = stack.enter_context(LegacyReader(family))
        return table in readers[family].tables() and readers[family].has_chain(table, name)

    def asked(family: Family, table: str, name: str) -> bool:
        try:
            return has_chain(family, table, name)
        except OSError:
            return False

    has_chain = legacy if backend is Backend.LEGACY else stack.enter_context(NftablesReader()).chain_exists
    return asked


def choose(configured: Backend | None, remembered: Backend | None) -> Backend:
    """The configured backend, else the neighbours', else the one used last, else the one of `iptables`."""
    if configured:
        return configured
    shown = evidence()
    return shown[0] if shown else remembered or of_tool()


def of_tool() -> Backend:
    """What the node's plain `iptables` writes to; raises FirewallError when there is none."""
    try:
        result = run(["iptables", "-V"], timeout=10.0)
    except ProgramError as error:
        raise FirewallError(str(error)) from error
    return Backend.NFT if "nf_tables" in result.stdout else Backend.LEGACY
