"""The rules of seed 000's node, as far as its log tells them, at the same places: kube-proxy's and Calico's.

The NodePort is 31002 and the pod listens on 8200, as there; the addresses are the lab's. What the log doesn't name is
filled with rules of the same kind that don't match.
"""

from lab.layout import NODE, POD1
from lab.node import TOOLS, Node

RAW = """*raw
-A OUTPUT -p udp -m udp --dport 4789 -j CT --notrack
COMMIT
"""
MANGLE = """*mangle
:OUTPUT ACCEPT [0:0]
COMMIT
"""
FILTER = """*filter
:cali-OUTPUT - [0:0]
-A OUTPUT -m comment --comment "cali:tVnHkvAo15HuiPy0" -j cali-OUTPUT
-A INPUT -p tcp -m tcp --dport 31002 -j DROP
COMMIT
"""
NAT = """*nat
:cali-OUTPUT - [0:0]
:cali-fip-dnat - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-EANZGUQV3HZVGERW - [0:0]
:KUBE-SEP-E6KGZ7LKAMZFQR62 - [0:0]
-A OUTPUT -m comment --comment "cali:tVnHkvAo15HuiPy0" -j cali-OUTPUT
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A cali-OUTPUT -m comment --comment "cali:GBTAv2p5CwevEyJm" -j cali-fip-dnat
{services}
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" \
-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
{nodeports}
-A KUBE-NODEPORTS -p tcp -m comment --comment "vault/vault:http" -m tcp --dport 31002 -j KUBE-SVC-EANZGUQV3HZVGERW
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SVC-EANZGUQV3HZVGERW ! -s {pods} -d {service} -p tcp -m tcp --dport 8200 -j KUBE-MARK-MASQ
-A KUBE-SVC-EANZGUQV3HZVGERW -p tcp -m comment --comment "vault/vault:http" -m tcp --dport 31002 -j KUBE-MARK-MASQ
-A KUBE-SVC-EANZGUQV3HZVGERW -m comment --comment "vault/vault:http" -j KUBE-SEP-E6KGZ7LKAMZFQR62
-A KUBE-SEP-E6KGZ7LKAMZFQR62 -s {pod} -m comment --comment "vault/vault:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-E6KGZ7LKAMZFQR62 -p tcp -m comment --comment "vault/vault:http" -m tcp -j DNAT --to-destination {to}:8200
COMMIT
"""


def put(node: Node, family: str = "ipv4") -> None:
    """Put these rules in force on an empty node."""
    pod, service = POD1.of(family), "10.43.0.200" if family == "ipv4" else "fd43::200"
    services = "\n".join(
        f'-A KUBE-SERVICES -d {service} -p tcp -m comment --comment "shop/web{n}" -m tcp --dport {n} -j KUBE-MARK-MASQ'
        for n in range(1, 458)
    )
    nodeports = "\n".join(
        f'-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/web{n}" -m tcp --dport {n} -j KUBE-MARK-MASQ'
        for n in range(32001, 32064)
    )
    pods, to = ("10.42.0.0/16", pod) if family == "ipv4" else ("fd42::/48", f"[{pod}]")
    nat = NAT.format(services=services, nodeports=nodeports, pods=pods, service=service, pod=pod, to=to)
    node.run([f"{TOOLS[family]}-{node.backend}-restore"], stdin=RAW + MANGLE + nat + FILTER)


def dialled(family: str) -> tuple[str, int]:
    """What the seed's reader dials: the node's own address and the NodePort."""
    return NODE.of(family), 31002
