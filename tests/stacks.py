"""Nodes as kube-proxy, Calico, flannel, Docker and ufw leave them, with somebody to reach behind every door.

What is captured is loaded as it was captured; what is written out here has the layout of its program, as published or
captured elsewhere, with the addresses of the lab. IPVS itself is not in every kernel: see `_ipvs`.
"""

from collections.abc import Callable

from captured import CAPTURES, add_capture, restore
from packets import iptables

from lab.layout import FAMILIES, POD1, POD2, RELAY_SERVICE, WEB_SERVICE, Address
from lab.node import BackendName, Node
from lab.traffic import serve, serve_cluster

CONTAINER = Address("172.17.0.2", "fd00:d0c::242:ac11:2")
PODS = Address("10.42.0.0/16", "fd42::/48")
_UPLINK = "ens18"


def _bracketed(address: Address, family: str) -> str:
    return address.ipv4 if family == "ipv4" else f"[{address.ipv6}]"


def _serve(node: Node) -> None:
    serve_cluster(node)
    serve(node, "node", tcp=[80, 443, 179, 5473, 7023, 7024, 9100, 9345, 30146], udp=[8472])
    serve(node, "beyond", tcp=[80, 30001, 8080], udp=[53])
    serve(node, "client", tcp=[7999])


# A NodePort by UDP, which the captured kube-proxy has none of: dns, 31053.
_UDP_NODEPORT = """*nat
-A KUBE-NODEPORTS -p udp -m comment --comment "kube-system/dns:p" -m udp --dport 31053 -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS -p udp -m comment --comment "kube-system/dns:p" -m udp --dport 31053 -j DNAT --to-destination {pod}:53
COMMIT
"""

# The CNI plugin portmap for a pod with hostPorts 8088/tcp and 5300/udp, as captured of cni-plugins 1.1.1.
_PORTMAP = """*nat
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
:CNI-DN-7876a1645ee61b4df5ed1 - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"cbr0\\" id: \\"web\\"" -m multiport --dports 8088 \
-j CNI-DN-7876a1645ee61b4df5ed1
-A CNI-HOSTPORT-DNAT -p udp -m comment --comment "dnat name: \\"cbr0\\" id: \\"web\\"" -m multiport --dports 5300 \
-j CNI-DN-7876a1645ee61b4df5ed1
-A CNI-DN-7876a1645ee61b4df5ed1 -s {pods} -p tcp -m tcp --dport 8088 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-7876a1645ee61b4df5ed1 -p tcp -m tcp --dport 8088 -j DNAT --to-destination {pod}:80
-A CNI-DN-7876a1645ee61b4df5ed1 -s {pods} -p udp -m udp --dport 5300 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-7876a1645ee61b4df5ed1 -p udp -m udp --dport 5300 -j DNAT --to-destination {pod}:53
COMMIT
"""

# flannel accepts the pods' addresses; kube-router leads every packet first to its own chains, here with a policy that
# opens pod1's web ports to all.
_K3S = """*filter
:FLANNEL-FWD - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:KUBE-ROUTER-OUTPUT - [0:0]
:KUBE-POD-FW-4BDGZEWEU32YM75H - [0:0]
-I INPUT 1 -m comment --comment "kube-router netpol - 4IA2OSFRMVNDXBVV" -j KUBE-ROUTER-INPUT
-I FORWARD 1 -m comment --comment "kube-router netpol - TEMCG2JMHZYE7H7T" -j KUBE-ROUTER-FORWARD
-I OUTPUT 1 -m comment --comment "kube-router netpol - VEAAIY32XVBHCSCY" -j KUBE-ROUTER-OUTPUT
-A FORWARD -m comment --comment "KUBE-ROUTER rule to explicitly ACCEPT traffic that comply to network policies" \
-m mark --mark 0x20000/0x20000 -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {pods} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {pods} -m comment --comment "flanneld forward" -j ACCEPT
-A KUBE-ROUTER-FORWARD -d {bare} -m comment --comment "rule to jump traffic destined to POD name:web namespace: shop \
to chain KUBE-POD-FW-4BDGZEWEU32YM75H" -j KUBE-POD-FW-4BDGZEWEU32YM75H
-A KUBE-POD-FW-4BDGZEWEU32YM75H -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-POD-FW-4BDGZEWEU32YM75H -p tcp -m multiport --dports 80,8080,8081 -j MARK --set-xmark 0x10000/0x10000
-A KUBE-POD-FW-4BDGZEWEU32YM75H -p udp --dport 53 -j MARK --set-xmark 0x10000/0x10000
-A KUBE-POD-FW-4BDGZEWEU32YM75H -m mark ! --mark 0x10000/0x10000 -j REJECT
-A KUBE-POD-FW-4BDGZEWEU32YM75H -j MARK --set-xmark 0x0/0x10000
-A KUBE-POD-FW-4BDGZEWEU32YM75H -j MARK --set-xmark 0x20000/0x20000
COMMIT
"""

# The rules that seed 002's node has for the pods' addresses.
_POD_ACCEPTS = """*filter
:FORWARD DROP [0:0]
-A FORWARD -s {pods} -j ACCEPT
-A FORWARD -d {pods} -j ACCEPT
COMMIT
"""

# dockerd publishes one more port of the captured container: -p 5354:53/udp.
_PUBLISHED_UDP = """*nat
-A DOCKER ! -i docker0 -p udp -m udp --dport 5354 -j DNAT --to-destination {container}:53
COMMIT
*filter
-A DOCKER -d {bare} ! -i docker0 -o docker0 -p udp -m udp --dport 53 -j ACCEPT
COMMIT
"""


def _kube(node: Node) -> None:
    add_capture(node, "kp126-{backend}-3svc")
    node.sysctl("net.ipv4.conf.all.route_localnet", "1")  # kube-proxy's, for NodePorts on 127.0.0.1
    for family in FAMILIES:
        restore(node, family, _UDP_NODEPORT.format(pod=_bracketed(POD1, family)))


def _docker(node: Node) -> None:
    nets = {"node": ["172.17.0.1/16", "fd00:d0c::1/64"], "host": [f"{CONTAINER.ipv4}/16", f"{CONTAINER.ipv6}/64"]}
    node.attach("web", "docker0", **nets)
    node.load(CAPTURES / "docker-20.10-{backend}-container-published.v4.rules")
    node.load(CAPTURES / "docker-20.10-{backend}-ip6tables-container-published.v6.rules")
    for family in FAMILIES:
        texts = {"container": _bracketed(CONTAINER, family), "bare": CONTAINER.of(family)}
        restore(node, family, _PUBLISHED_UDP.format(**texts))
    serve(node, "web", tcp=[80], udp=[53])


def _portmap(node: Node) -> None:
    for family in FAMILIES:
        restore(node, family, _PORTMAP.format(pods=PODS.of(family), pod=_bracketed(POD1, family)))


def _kubeadm(backend: BackendName) -> Node:
    """kube-proxy in iptables mode."""
    node = Node(backend, uplink=_UPLINK)
    _kube(node)
    return node


def _pods_behind_docker(backend: BackendName) -> Node:
    """Docker, kube-proxy, and rules for the pods' addresses: the node of seed 002."""
    node = Node(backend, uplink=_UPLINK)
    _docker(node)
    _kube(node)
    for family in FAMILIES:
        restore(node, family, _POD_ACCEPTS.format(pods=PODS.of(family)))
    return node


def _flannel(backend: BackendName) -> Node:
    """Docker, kube-proxy, flannel, and hostPorts by portmap: the node of seed 003."""
    node = _pods_behind_docker(backend)
    _portmap(node)
    return node


def _k3s(backend: BackendName) -> Node:
    node = Node(backend, uplink=_UPLINK)
    _kube(node)
    _portmap(node)
    for family in FAMILIES:
        restore(node, family, _K3S.format(pods=PODS.of(family), bare=POD1.of(family)))
    return node


def _calico(backend: BackendName) -> Node:
    node = Node(backend, uplink=_UPLINK, pod_links=("caliabc00000000", "caliabc00001eef"))
    node.load(CAPTURES / "kp126+felix3264-insert-{backend}-3svc")
    for family in FAMILIES:  # the captured Felix lets no pod call its own node: as if set to Return, as operators do
        last = len(node.chain("filter", "cali-wl-to-host", family))
        iptables(node, family, f"-D cali-wl-to-host {last}")
    serve(node, "node", udp=[31000])
    return node


def _docker_host(backend: BackendName) -> Node:
    node = Node(backend, uplink=_UPLINK)
    _docker(node)
    return node


def _ufw(backend: BackendName) -> Node:
    """ufw with ssh allowed, then Docker, which puts its rules above."""
    node = _docker_host(backend)
    add_capture(node, "ufw-0.36.2-{backend}-after-allow")
    return node


def _ipvs(backend: BackendName) -> Node:
    """The ports of Services arrive in INPUT, at addresses on an interface kube-ipvs0 that is down.

    The lab's kernels have no IPVS: listeners of the node stand in for it, which come at the same place in INPUT, and a
    bridge without ports for the dummy interface. kube-proxy's chains are those that it has in this mode.
    """
    node = Node(backend, uplink=_UPLINK)
    node.run("ip link add kube-ipvs0 type bridge")
    for family, length in (("ipv4", 32), ("ipv6", 128)):
        for service in (WEB_SERVICE, RELAY_SERVICE):
            node.run(f"ip addr add {service.of(family)}/{length} dev kube-ipvs0" + " nodad" * (family == "ipv6"))
        inet = "inet" if family == "ipv4" else "inet6"
        name = "KUBE-CLUSTER-IP" if family == "ipv4" else "KUBE-6-CLUSTER-IP"
        ports = "KUBE-NODE-PORT-TCP" if family == "ipv4" else "KUBE-6-NODE-PORT-TCP"
        sets = [f"create {name} hash:ip,port family {inet}", f"add {name} {WEB_SERVICE.of(family)},tcp:80"]
        sets += [f"create {ports} bitmap:port range 0-65535", f"add {ports} 31002"]
        node.run(["ipset", "restore"], stdin="\n".join(sets) + "\n")
        restore(node, family, _IPVS.format(cluster=name, ports=ports, pods=PODS.of(family)))
    serve(node, "node", tcp=[31002, 30001], udp=[31053])
    return node


_IPVS = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-NODE-PORT -p tcp -m set --match-set {ports} dst -j KUBE-MARK-MASQ
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES ! -s {pods} -m set --match-set {cluster} dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-SERVICES -m set --match-set {cluster} dst,dst -j ACCEPT
COMMIT
"""

# The layout of kube-proxy's nftables mode (KEP-3866, as kube-proxy 1.31 writes it), without its checks of no endpoints.
_NFTABLES = """
table {ip} kube-proxy {{
  map service-ips {{
    type {addr} . inet_proto . inet_service : verdict
    elements = {{ {web} . tcp . 80 : goto service-XFKN4M7H }}
  }}
  map service-nodeports {{
    type inet_proto . inet_service : verdict
    elements = {{ tcp . 31002 : goto external-XFKN4M7H, tcp . 30001 : goto external-7AZRLOZD,
                  udp . 31053 : goto external-TCOU7JCQ }}
  }}
  set nodeport-ips {{ type {addr}; elements = {{ {node} }} }}
  chain mark-for-masquerade {{ meta mark set mark or 0x4000; }}
  chain masquerading {{
    meta mark & 0x4000 == 0 return
    meta mark set mark xor 0x4000
    masquerade fully-random
  }}
  chain services {{
    {ip} daddr . meta l4proto . th dport vmap @service-ips
    {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
  chain endpoint-QECRXVC6 {{ {ip} saddr {pod1} jump mark-for-masquerade
    meta l4proto tcp dnat to {to1}:8080; }}
  chain endpoint-SFOZXTMH {{ {ip} saddr {pod2} jump mark-for-masquerade
    meta l4proto tcp dnat to {to2}:8080; }}
  chain endpoint-CVMJ4GW2 {{ meta l4proto tcp dnat to {to1}:8081; }}
  chain endpoint-F7IYY5KQ {{ meta l4proto udp dnat to {to1}:53; }}
  chain service-XFKN4M7H {{
    {ip} daddr {web} tcp dport 80 {ip} saddr != {pods} jump mark-for-masquerade
    numgen random mod 2 vmap {{ 0 : goto endpoint-QECRXVC6, 1 : goto endpoint-SFOZXTMH }}
  }}
  chain external-XFKN4M7H {{ jump mark-for-masquerade
    goto service-XFKN4M7H; }}
  chain external-7AZRLOZD {{ goto endpoint-CVMJ4GW2; }}
  chain external-TCOU7JCQ {{ jump mark-for-masquerade
    goto endpoint-F7IYY5KQ; }}
}}
"""


def _nftables(backend: BackendName) -> Node:
    """kube-proxy in nftables mode, written by hand; nodewalld's own rules are in either backend of iptables."""
    node = Node(backend, uplink=_UPLINK)
    for family in FAMILIES:
        ip, addr = ("ip", "ipv4_addr") if family == "ipv4" else ("ip6", "ipv6_addr")
        text = _NFTABLES.format(
            ip=ip,
            addr=addr,
            web=WEB_SERVICE.of(family),
            node="10.90.0.1, 172.18.10.1" if family == "ipv4" else "fd90::1, fd00:18::1",
            pods=PODS.of(family),
            pod1=POD1.of(family),
            pod2=POD2.of(family),
            to1=_bracketed(POD1, family),
            to2=_bracketed(POD2, family),
        )
        node.run(["nft", "-f", "-"], stdin=text)
    return node


STACKS: dict[str, Callable[[BackendName], Node]] = {
    "kubeadm": _kubeadm,
    "seed 002": _pods_behind_docker,
    "seed 003": _flannel,
    "calico": _calico,
    "k3s": _k3s,
    "docker": _docker_host,
    "ufw": _ufw,
    "ipvs": _ipvs,
    "nftables": _nftables,
}


def build(stack: str, backend: BackendName) -> Node:
    """A node with that stack, everything listening; close it when done."""
    node = STACKS[stack](backend)
    _serve(node)
    return node
