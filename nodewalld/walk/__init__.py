"""One packet walked through a node's rules, without the node: `judge(packet, world)` says what becomes of it, and why.

    from nodewalld.walk import Packet, World, judge

    packet = Packet(Family.IPV4, TCP, source, destination, destination_ports=(31002, 31002), inside="ens18")
    verdict = judge(packet, world)
    verdict.passes      # True, False, or None where it hangs on what isn't known
    verdict.outcomes    # {Outcome.FORWARDED}
    verdict.deciders    # the rules that ended it; `rule.tag` is our entry, "" for a foreign rule
    verdict.paths       # every way that can't be ruled out: steps, conditions, end
    notes(verdict, world)  # what people ask next, such as which DROP can't see the packet

A `World` is one node in one family. `nodewalld.kernel.node.gather` makes it of the live node. By hand it is made with
`read` of what iptables-save prints, `read_sets` of `ipset save`, `read_table` of `nft -j list table`, and `Routes`,
which hold the node's addresses as "local" routes.

Laws: pure; the modules here import nothing but the core. Nothing is guessed: an unknown condition, target, set or chain
forks the way or leaves a doubt, and a verdict that hangs on it is None.
"""

from nodewalld.walk.ipsets import IpSet, read_sets
from nodewalld.walk.judge import judge
from nodewalld.walk.nft import read_table
from nodewalld.walk.packet import EPHEMERAL, ICMP, ICMPV6, SCTP, TCP, UDP, Packet, Tracked
from nodewalld.walk.routes import Kind, PolicyRule, Route, Routes, Unclear
from nodewalld.walk.rules import Rule, Ruleset, read
from nodewalld.walk.story import notes
from nodewalld.walk.verdict import PASSES, End, Outcome, Path, Step, Verdict
from nodewalld.walk.world import BaseChain, Unread, World

__all__ = [
    "EPHEMERAL",
    "ICMP",
    "ICMPV6",
    "PASSES",
    "SCTP",
    "TCP",
    "UDP",
    "BaseChain",
    "End",
    "IpSet",
    "Kind",
    "Outcome",
    "Packet",
    "Path",
    "PolicyRule",
    "Route",
    "Routes",
    "Rule",
    "Ruleset",
    "Step",
    "Tracked",
    "Unclear",
    "Unread",
    "Verdict",
    "World",
    "judge",
    "notes",
    "read",
    "read_sets",
    "read_table",
]
