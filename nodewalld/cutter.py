"""Ends the tracked connections that a redirect should have caught: nat sees only a flow's first packet."""

from collections.abc import Mapping

from nodewalld.core.decide import Decisions
from nodewalld.core.flows import Dialled, slipped, wants_flows
from nodewalld.core.words import Family
from nodewalld.kernel.conntrack import Conntrack, Flow

_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}


class FlowCutter:
    """Looks through the connection table, where there is any redirect to judge its flows by.

    `error` tells why that was not possible the last time: a kernel may lack nf_conntrack_netlink.
    """

    def __init__(self) -> None:
        self._conntrack = Conntrack()
        self.error = ""

    def cut(self, decisions: Mapping[Family, Decisions]) -> int:
        """Delete the flows that the decisions refuse; returns how many."""
        wanted = {family: decided for family, decided in decisions.items() if wants_flows(decided)}
        self.error = ""
        try:
            return sum(self._cut(family, decided) for family, decided in wanted.items())
        except OSError as error:
            self.error = f"connections that a redirect refuses could not be ended: {error}"
            return 0

    def _cut(self, family: Family, decisions: Decisions) -> int:
        refused = (flow for flow in self._conntrack.flows(family) if slipped(decisions, _dialled(flow)))
        return sum(self._conntrack.delete(flow) for flow in refused)


def _dialled(flow: Flow) -> Dialled:
    protocol = _PROTOCOLS.get(flow.protocol, "")
    rewritten = (flow.reply_source, flow.reply_port) != (flow.destination, flow.port)
    return Dialled(protocol, flow.source, flow.destination, flow.port, flow.reply_port, rewritten)
