"""Random rulesets for the lab's node, always the same ones: configurations of ours, rules of nobody in particular."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab.layout import ALLOWED, BEYOND, CLUSTER_NODE, NODE, POD1, POD2, RELAY_SERVICE, STRANGER, WEB_SERVICE, Address
from nodewalld.configuration.load import load
from nodewalld.core.config import Place
from nodewalld.core.decide import decide
from nodewalld.core.desired import Desired
from nodewalld.core.environment import Environment
from nodewalld.core.iptables.render import render
from nodewalld.core.words import Family, Table

PORTS = (22, 53, 80, 443, 6443, 8080, 8081, 9000, 30001, 31002, 8088, 2222)
_PARTIES = (STRANGER, ALLOWED, CLUSTER_NODE, POD1, POD2, BEYOND, NODE, WEB_SERVICE, RELAY_SERVICE)
_NETWORKS = (
    *(Address(f"{p.ipv4}/32", f"{p.ipv6}/128") for p in _PARTIES),
    Address("10.42.0.0/16", "fd42::/48"),
    Address("10.90.0.0/24", "fd90::/64"),
    Address("10.43.0.0/16", "fd43::/64"),
    Address("0.0.0.0/1", "8000::/1"),
)
_TYPES = ("LOCAL", "UNICAST", "MULTICAST", "LOCAL,BROADCAST")
_STATES = ("NEW", "INVALID,UNTRACKED", "DNAT", "SNAT", "RELATED,ESTABLISHED")
_INTERFACES = ("ens18", "cni0", "eth1", "ens+", "lo", "docker0")
_DNAT_PORT = re.compile(r"--to-destination [\d.]+:\d")


def environment() -> Environment:
    """The lab's node, as the compiler sees it."""
    return Environment(
        {Family.IPV4: ("10.90.0.1", "172.18.10.1", "10.42.0.1", "198.51.100.1"), Family.IPV6: ("fd90::1", "fd42::1")},
        {},
        {Family.IPV4: ("ens18",), Family.IPV6: ("ens18",)},
    )


def configuration(rng: random.Random) -> str:
    """A nodewalld.toml with a few of everything."""
    some = rng.choice
    flag = ("true", "false")
    lines = ["[failsafe]\nports = " + some(["[]", '["22/tcp"]'])]
    lines.append('[set.friends]\nentries = ["10.90.0.7", "fd90::7", "172.18.10.0/24", "fd00:18::/64"]')
    peers = ['"any"', '"@friends"', '"10.42.0.0/16", "fd42::/48"', '"203.0.113.7", "2001:db8:c::7"', ""]
    for number in range(rng.randint(0, 3)):
        entry = {
            "name": f'"p{number}"',
            "ports": str(rng.sample(PORTS, 3)),
            "protocol": some(['["tcp"]', '["tcp", "udp"]']),
            "allow": f"[{some(peers)}]",
            "deny": f"[{some([*peers[2:], '', ''])}]",
            "action": some(['"drop"', '"reject"', '"redirect"']),
            "from_node": some(flag),
            "enforce": some(["true", *flag]),
            "destination": some(['"local"', '"any"', '["10.43.0.0/16", "fd43::/64"]']),
        }
        lines.append("[[port]]\n" + _keys(entry))
    for number in range(rng.randint(0, 2)):
        entry = {
            "name": f'"f{number}"',
            "in": some(['""', '"ens18"', '"cni+"', '"!eth1"']),
            "out": some(['""', '"cni0"', '"!ens18"']),
            "source": some(['"any"', '"!@friends"', '"10.42.0.0/16"']),
            "action": some(['"accept"', '"drop"', '"reject"']),
        }
        lines.append("[[forward]]\n" + _keys(entry | some([{}, {"position": '"early"'}, {"position": '"last"'}])))
    if rng.random() < 0.5:
        inner = {"sources": '["@friends"]', "services": '["ssh", "http"]', "target": '"accept"'}
        target = some(['"accept"', '"drop"', '"reject"'])
        outer = {"interfaces": '["ens18"]', "ports": '["31002/tcp", "53/udp"]', "target": target}
        lines += ["[zone.inner]\n" + _keys(inner), "[zone.outer]\n" + _keys(outer)]
    return "\n\n".join(lines) + "\n"


def _keys(entry: Mapping[str, str]) -> str:
    return "\n".join(f"{key} = {value}" for key, value in entry.items())


def ours(text: str, folder: Path) -> dict[Family, Desired]:
    """What a configuration compiles to on the lab's node."""
    folder.mkdir(exist_ok=True)
    (folder / "nodewalld.toml").write_text(text)
    config = load(folder, check_owner=False)
    return {family: render(decide(config, family, environment())) for family in Family}


def restore_input(desired: Desired) -> str:
    """Our rules as iptables-restore takes them beside what is there, each jump on top or at the bottom."""
    parts = []
    for table, wanted in desired.tables.items():
        lines = [f"*{table}", *(f":{chain.name} - [0:0]" for chain in wanted.chains)]
        lines += [f"-A {chain.name} {line.text}" for chain in wanted.chains for line in chain.lines if not line.needs]
        for place in reversed(wanted.placements):
            command = f"-A {place.chain}" if place.position.place is Place.LAST else f"-I {place.chain} 1"
            lines.append(f"{command} {place.text}")
        parts.append("\n".join((*lines, "COMMIT\n")))
    return "".join(parts)


def sets(family: Family, desired: Desired) -> str:
    """What `ipset restore` takes: our sets, and some of every type that rules ask."""
    inet, suffix = ("inet", "") if family is Family.IPV4 else ("inet6", "-v6")

    def of(party: Address) -> str:
        return party.of(family.value)

    lines = []
    for one in desired.sets:
        lines.append(f"create {one.name} hash:net family {inet}")
        lines += [f"add {one.name} {network}" for network in sorted(one.networks, key=str)]
    content = {
        "w_net": (f"hash:net family {inet}", [of(_NETWORKS[9]), of(_NETWORKS[3]) + " nomatch", of(_NETWORKS[0])]),
        "w_ip": (f"hash:ip family {inet}", [of(ALLOWED), of(POD1), of(NODE)]),
        "w_ipport": (
            f"hash:ip,port family {inet}",
            [f"{of(NODE)},tcp:31002", f"{of(POD1)},udp:53", f"{of(POD2)},tcp:8080"],
        ),
        "w_port": ("bitmap:port range 0-65535", ["80", "31002", "8080"]),
        "w_iface": (f"hash:net,iface family {inet}", [f"{of(_NETWORKS[9])},cni0", f"{of(_NETWORKS[12])},ens18"]),
    }
    for name, (kind, entries) in content.items():
        lines.append(f"create {name}{suffix} {kind}")
        lines += [f"add {name}{suffix} {entry}" for entry in entries]
    lines += [
        f"create w_list{suffix} list:set size 8",
        f"add w_list{suffix} w_ip{suffix}",
        f"add w_list{suffix} w_net{suffix}",
    ]
    return "\n".join(lines) + "\n"


class Noise:
    """Random rules of one family; every table gets a few chains and rules, at the top or at the bottom of others'."""

    def __init__(self, rng: random.Random, family: Family) -> None:
        self.rng, self.family = rng, family

    def text(self) -> str:
        """What iptables-restore takes beside what is there."""
        parts = []
        for table in (Table.RAW, Table.MANGLE, Table.NAT, Table.FILTER):
            own = [f"w{number}" for number in range(3)]
            lines = [f"*{table}", *(f":{name} - [0:0]" for name in own)]
            for index, name in enumerate(own):
                inner = own[index + 1 :]
                lines += [f"-A {name} {self._rule(table, name, inner)}" for _ in range(self.rng.randint(1, 4))]
            for chain in table.builtin_chains:
                for _ in range(self.rng.choice([0, 1, 2])):
                    command = self.rng.choice([f"-A {chain}", f"-I {chain} 1"])
                    lines.append(f"{command} {self._rule(table, chain, own)}")
            parts.append("\n".join((*lines, "COMMIT\n")))
        return "".join(parts)

    def _rule(self, table: Table, chain: str, chains: Sequence[str]) -> str:
        protocol = self.rng.choice(["", "", "tcp", "tcp", "udp", "icmp"])
        words = list(self._matches(chain, protocol))
        target = self._target(table, chain, chains)
        needs_ports = any(word in target for word in ("--to-ports", "tcp-reset", "]:")) or _DNAT_PORT.search(target)
        if needs_ports and protocol != "tcp":
            protocol = "tcp"
            words = list(self._matches(chain, protocol))
        name = "ipv6-icmp" if protocol == "icmp" and self.family is Family.IPV6 else protocol
        return " ".join((*((f"-p {name}",) if name else ()), *words, target))

    def _matches(self, chain: str, protocol: str) -> Iterator[str]:
        seen = set()
        for _ in range(self.rng.choice([0, 1, 1, 2])):
            match = self._match(chain, protocol)
            # Of two `-m tcp` in one rule iptables-nft-save 1.8.9 prints a mixture: that is no ruleset to be read.
            option = (
                match.removeprefix("! ")[:6] if match.startswith(("-m tcp", "-m udp")) else match.removeprefix("! ")[:2]
            )
            if option == "-m" or option not in seen:
                yield match
            seen.add(option)

    def _match(self, chain: str, protocol: str) -> str:
        rng, four = self.rng, self.family is Family.IPV4
        bang = rng.choice(["", "", "! "])
        network = rng.choice(_NETWORKS).of(self.family.value)
        suffix = "" if four else "-v6"
        found = [
            f"{bang}-s {network}",
            f"{bang}-d {network}",
            f"-m conntrack {bang}--ctstate {rng.choice(_STATES)}",
            f"-m conntrack --ctdir {rng.choice(['ORIGINAL', 'REPLY'])}",
            f"-m conntrack {bang}--ctorigdst {network}",
            f"-m addrtype {bang}--dst-type {rng.choice(_TYPES[:4] if four else _TYPES[:3])}",
            f"-m addrtype {bang}--src-type {rng.choice(['LOCAL', 'UNICAST'])}",
            f"-m mark {bang}--mark {rng.choice(['0x0/0xf', '0x4/0x4', '0x8/0xc'])}",
            f"-m connmark {bang}--mark {rng.choice(['0x0/0xf', '0x4/0x4'])}",
            f"-m set {bang}--match-set {rng.choice(['w_net', 'w_ip', 'w_list'])}{suffix} {rng.choice(['src', 'dst'])}",
            f"-m set {bang}--match-set w_ipport{suffix} dst,dst",
            f"-m set {bang}--match-set w_iface{suffix} src,src",
            f"-m iprange {bang}--src-range " + ("10.90.0.1-10.90.0.99" if four else "fd90::1-fd90::99"),
            '-m comment --comment "a \\"quoted\\" -j DROP"',
            f"-m pkttype {bang}--pkt-type unicast",
            "-m limit --limit 1000/sec --limit-burst 1000" if rng.random() < 0.3 else "-m comment --comment limit",
            "-m statistic --mode random --probability 0.5" if rng.random() < 0.3 else "-m comment --comment statistic",
        ]
        if chain in {"PREROUTING", "INPUT", "FORWARD"}:
            found.append(f"{bang}-i {rng.choice(_INTERFACES)}")
        if chain in {"OUTPUT", "POSTROUTING", "FORWARD"}:
            found.append(f"{bang}-o {rng.choice(_INTERFACES)}")
        if chain in {"OUTPUT", "POSTROUTING"}:
            found.append(f"-m owner {bang}--uid-owner 0" if rng.random() < 0.3 else "-m comment --comment owner")
        if protocol in {"tcp", "udp"}:
            port = rng.choice(PORTS)
            found += [
                f"-m {protocol} {bang}--dport {port}",
                f"-m {protocol} {bang}--dport {port}:{port + 2000}",
                f"-m multiport {bang}--dports {port},80,30000:32767",
                f"-m {protocol} {bang}--sport 32768:50000",
                f"-m conntrack {bang}--ctorigdstport {port}",
                f"-m set {bang}--match-set w_port{suffix} dst",
            ] * 2
        if protocol == "tcp":
            found.append(f"-m tcp {bang}--tcp-flags FIN,SYN,RST,ACK {rng.choice(['SYN', 'ACK'])}")
        if protocol == "icmp":
            found += ["-m icmp --icmp-type 8" if four else "-m icmp6 --icmpv6-type 128"] * 3
        return rng.choice(found)

    def _target(self, table: Table, chain: str, chains: Sequence[str]) -> str:
        rng, four = self.rng, self.family is Family.IPV4
        found = ["-j RETURN", "-j ACCEPT", *(f"{rng.choice(['-j', '-j', '-g'])} {name}" for name in chains)]
        if table is not Table.NAT:
            found += ["-j DROP"] * (rng.random() < 0.5)
        if table is Table.RAW:
            found += ["-j CT --notrack"]
        if table is Table.MANGLE:
            found += ["-j MARK --set-xmark 0x4/0x4", "-j MARK --set-xmark 0x8/0xf", "-j CONNMARK --save-mark", ""]
            found += ["-j CONNMARK --restore-mark --nfmask 0xf --ctmask 0xf", "-j CONNMARK --set-xmark 0x4/0xff"]
        if table is Table.FILTER:
            found += ["-j REJECT", "-j REJECT --reject-with tcp-reset", '-j LOG --log-prefix "w "']
        if table is Table.NAT:
            pod = rng.choice((POD1, POD2, BEYOND)).of(self.family.value)
            if chain in {"PREROUTING", "OUTPUT"}:
                port = rng.choice(PORTS)
                found += [
                    f"-j DNAT --to-destination {pod}:{port}" if four else f"-j DNAT --to-destination [{pod}]:{port}"
                ]
                found += [f"-j DNAT --to-destination {pod}", f"-j REDIRECT --to-ports {port}"]
            elif chain == "POSTROUTING":
                found += ["-j MASQUERADE", f"-j SNAT --to-source {NODE.of(self.family.value)}"]
        return rng.choice(found)


_NFT_MATCHES = (
    'iifname "ens18"',
    'iifname != "cni0"',
    'iifname "ens*"',
    'iifname { "cni0", "lo" }',
    "meta l4proto tcp",
    "meta l4proto { tcp, sctp }",
    "meta nfproto ipv4",
    "tcp dport { 80, 31002, 8000-9000 }",
    "tcp dport != 8080",
    "tcp sport 32768-50000",
    "udp dport 53",
    "th dport 30001",
    "ip saddr 10.90.0.0/24",
    "ip6 saddr fd90::/64",
    "ip daddr != { 10.90.0.1, 10.42.0.0/16 }",
    "ip6 daddr @own6",
    "ip saddr @nets",
    "ip saddr . tcp dport { 10.90.0.7 . 80, 203.0.113.7 . 31002 }",
    "ct state { established, related }",
    "ct state new",
    "ct state != invalid",
    "ct state invalid,untracked",
    "ct status dnat",
    "ct direction original",
    "ct mark 0x4",
    "ct original ip daddr 10.90.0.1",
    "meta l4proto tcp ct original proto-dst 31002",
    "fib daddr type local",
    "fib daddr type != { local, broadcast, multicast }",
    "fib saddr type local",
    "meta mark & 0xf == 0x4",
    "meta mark 0x0",
    "meta mark != 0x8",
    "tcp flags & (fin|syn|rst|ack) == syn",
    "tcp flags ack",
    "icmp type { echo-request, redirect }",
    "icmpv6 type echo-request",
)
_NFT_BASES = (
    ("early", "type filter hook prerouting priority -310"),
    ("before", "type filter hook prerouting priority -151"),
    ("between", "type filter hook prerouting priority -90"),
    ("within", "type filter hook input priority 10"),
    ("through", "type filter hook forward priority -5"),
    ("out", "type filter hook output priority -120"),
    ("post", "type filter hook postrouting priority 50"),
    ("bind", "type nat hook prerouting priority {}"),
)


def nft_table(rng: random.Random) -> str:
    """A native nft table with a few random rules on several hooks, as another program would have."""
    lines = [
        "table inet stranger {",
        "set nets { type ipv4_addr; flags interval; elements = { 203.0.113.0/24, 10.42.0.2 } }",
        "set own6 { type ipv6_addr; elements = { fd90::1, fd42::1 } }",
    ]
    for name in ("x1", "x0"):
        lines += [f"chain {name} {{", *(_nft_rule(rng, "", name) for _ in range(rng.randint(1, 4))), "}"]
    for name, hook in _NFT_BASES:
        if rng.random() < 0.5:
            policy = rng.choice(["accept", "accept", "accept", "accept", "drop"]) if name != "bind" else "accept"
            lines.append(f"chain {name} {{ {hook.format(rng.choice([-101, -99]))}; policy {policy};")
            lines += [*(_nft_rule(rng, name, name) for _ in range(rng.randint(1, 4))), "}"]
    return "\n".join([*lines, "}\n"])


def _nft_rule(rng: random.Random, base: str, name: str) -> str:
    matches = rng.sample(_NFT_MATCHES, rng.choice([0, 1, 1, 2]))
    if base in {"before", "between"} and rng.random() < 0.2:
        matches = [rng.choice(["fib saddr . mark . iif oif missing", "fib saddr . iif oif exists"])]
    if base == "bind":
        return rng.choice(["tcp dport 80 dnat ip to 10.42.0.2:8080", "tcp dport 443 redirect to :8081", "return"])
    found = [
        "accept",
        "return",
        "counter",
        "drop",
        "meta mark set 0x4",
        "meta mark set meta mark | 0x8",
        "ct mark set 0x4",
    ]
    found += ["jump x0", "goto x0", "tcp dport vmap { 80 : drop, 31002 : jump x1, 9000-9999 : return }"] * bool(base)
    found += ["jump x1"] * (name == "x0")
    found += ["reject", "reject with icmpx port-unreachable"] * (base in {"within", "through", "out"})
    found += ["notrack"] * (base == "early")
    statement = rng.choice(found)
    # nft refuses what contradicts itself, such as a TCP port of an ICMP packet.
    kinds = {word for match in matches for word in ("ip ", "ip6 ", "icmp ", "icmpv6 ", "tcp ", "udp ") if word in match}
    if "vmap" in statement:
        matches = []
    elif len(kinds) > 1 or "l4proto" in str(matches):
        matches = matches[:1]
    return " ".join((*matches, statement))


_FROM = (
    ("client", "ens18", (STRANGER, ALLOWED, CLUSTER_NODE)),
    ("pod1", "cni0", (POD1,)),
    ("beyond", "eth1", (BEYOND,)),
    ("node", "", (NODE, NODE, Address("127.0.0.1", "::1"))),
)
_ELSEWHERE = Address("192.0.2.50", "2001:db8:5::50")
_GROUPS = (Address("224.0.0.1", "ff02::1"), Address("10.90.0.255", "ff02::2"))


def packets(rng: random.Random, family: Family, count: int, first: int) -> list[dict[str, object]]:
    """Packets to whoever the lab and the captures know, each with a number and a source port of its own."""
    found = []
    to = (NODE, NODE, NODE, WEB_SERVICE, RELAY_SERVICE, POD1, POD2, BEYOND, _ELSEWHERE, Address("10.43.0.1", "fd43::1"))
    for number in range(first, first + count):
        ns, device, sources = rng.choices(_FROM, (6, 2, 1, 3))[0]
        source, target = rng.choice(sources), rng.choice(to)
        if source.ipv4 == "127.0.0.1":
            target = Address("127.0.0.1", "::1")
        elif ns == "client" and rng.random() < 0.05:
            target = rng.choice(_GROUPS)
        protocol = rng.choices((6, 17, 132, 1 if family is Family.IPV4 else 58), (10, 4, 1, 2))[0]
        one: dict[str, object] = {
            "number": number,
            "ns": ns,
            "device": device,
            "source": source.of(family.value),
            "to": target.of(family.value),
            "protocol": protocol,
        }
        if protocol in {1, 58}:
            one["icmp"] = rng.choices(
                ((8, 0), (13, 0), (5, 1)) if protocol == 1 else ((128, 0), (139, 0), (137, 0)), (8, 1, 1)
            )[0]
        else:
            one |= {"port": rng.choice(PORTS), "sport": 32768 + number % 28000}
        found.append(one)
    return found


def services(count: int, family: Family) -> str:
    """A nat and a filter table as kube-proxy lays them out, for so many Services of two pods and a NodePort each."""
    four = family is Family.IPV4
    net = "10.42.0.0/16" if four else "fd42::/48"
    chains, dispatch, ports, rest = [], [], [], []
    for n in range(count):
        name = f"{n:016d}"
        cluster = f"10.43.{n // 250}.{n % 250 + 1}/32" if four else f"fd43::{n:x}/128"
        pods = [f"10.42.{n // 250}.{n % 250 + k}" if four else f"fd42::{n // 250}:{n % 250 + k:x}" for k in (0, 1)]
        said = f'-m comment --comment "shop/service-{n}:p'
        chains += [f":KUBE-{kind}-{name} - [0:0]" for kind in ("SVC", "EXT", "SEP0", "SEP1")]
        dispatch.append(f'-A KUBE-SERVICES -d {cluster} -p tcp {said} cluster IP" -m tcp --dport 80 -j KUBE-SVC-{name}')
        ports.append(f'-A KUBE-NODEPORTS -p tcp {said}" -m tcp --dport {30000 + n} -j KUBE-EXT-{name}')
        rest += [
            f'-A KUBE-EXT-{name} {said} masquerade" -j KUBE-MARK-MASQ',
            f"-A KUBE-EXT-{name} -j KUBE-SVC-{name}",
            f'-A KUBE-SVC-{name} ! -s {net} -d {cluster} -p tcp {said}" -m tcp --dport 80 -j KUBE-MARK-MASQ',
            f'-A KUBE-SVC-{name} {said} -> first" -m statistic --mode random --probability 0.5 -j KUBE-SEP0-{name}',
            f'-A KUBE-SVC-{name} {said} -> second" -j KUBE-SEP1-{name}',
        ]
        for k, pod in enumerate(pods):
            to = f"{pod}:8080" if four else f"[{pod}]:8080"
            rest.append(f'-A KUBE-SEP{k}-{name} -s {pod} {said}" -j KUBE-MARK-MASQ')
            rest.append(f'-A KUBE-SEP{k}-{name} -p tcp {said}" -m tcp -j DNAT --to-destination {to}')
    head = [f":{name} ACCEPT [0:0]" for name in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")]
    head += [f":KUBE-{name} - [0:0]" for name in ("SERVICES", "NODEPORTS", "MARK-MASQ", "POSTROUTING")]
    fixed = [
        "-A PREROUTING -j KUBE-SERVICES",
        "-A OUTPUT -j KUBE-SERVICES",
        "-A POSTROUTING -j KUBE-POSTROUTING",
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
    ]
    last = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
    nat = ["*nat", *head, *chains, *fixed, *dispatch, last, *ports, *rest, "COMMIT"]
    forward = "-A FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT"
    rules = ["*filter", ":INPUT ACCEPT [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT ACCEPT [0:0]", forward, "COMMIT", ""]
    return "\n".join([*nat, *rules])
