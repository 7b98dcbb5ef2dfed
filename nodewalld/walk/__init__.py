"""One packet walked through a node's rules, without the node: `judge(packet, world)` says what becomes of it, and why.

    from nodewalld.walk import Packet, World, judge

    packet = Packet(Family.IPV4, TCP, source, destination, destination_ports=(31002, 31002), inside="ens18")
    verdict = judge(packet, world)
    verdict.passes      # True, False, or None where it hangs on what isn't known
    verdict.outcomes    # {Outcome.FORWARDED}
    verdict.deciders    # the rules that ended it; `rule.tag` is our entry, "" for a foreign rule
    verdict.paths       # every way that can't be ruled out, with steps, conditions and end

A `World` is one node in one family. It is gathered from the live node by `nodewalld.kernel.world`, or made by hand:
`read` takes iptables-save's text, `read_sets` ipset's, and `Routes` holds addresses as routes of the table "local".

Laws: pure; the modules here import nothing but the core. Nothing is guessed: an unknown condition, target, set or chain
forks the way or leaves a doubt, and a verdict that hangs on it is None.
"""

from nodewalld.walk.ipsets import IpSet, read_sets
from nodewalld.walk.judge import judge
from nodewalld.walk.packet import ICMP, ICMPV6, SCTP, TCP, UDP, Packet, Tracked
from nodewalld.walk.routes import Kind, PolicyRule, Route, Routes
from nodewalld.walk.rules import Rule, Ruleset, read
from nodewalld.walk.verdict import End, Outcome, Path, Step, Verdict
from nodewalld.walk.world import Unread, World

__all__ = [
    "ICMP",
    "ICMPV6",
    "SCTP",
    "TCP",
    "UDP",
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
    "Unread",
    "Verdict",
    "World",
    "judge",
    "read",
    "read_sets",
]
