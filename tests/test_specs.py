"""Whatever iptables can say survives being said: after the first commit no rule text ever looks like drift.

The kernel and its tools rewrite nearly every text (names, masks, defaults, orders). The texts below are our own; those
of iptables' extension tests are tried as well where they are at hand.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from live import WriteLog, ask, events, generation, in_force

from lab import layout
from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import TOOLS, Node
from lab.traffic import Probe, connect_all
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

# Texts that iptables' own tests hold; under the GPL and so no part of this project.
SPECS = Path(__file__).resolve().parents[2] / "shared/captures/iptables-specs/specs.tsv"


class Text(NamedTuple):
    tool: str  # iptables, ip6tables or both
    table: str
    chain: str
    rule: str


BOTH = "both"
TEXTS = [
    # Addresses, interfaces, protocols: masks are cut, numbers named, names numbered.
    Text("iptables", "filter", "INPUT", "-s 10.1.2.3/8 -j ACCEPT"),
    Text("iptables", "filter", "INPUT", "-s 10.0.0.0/255.0.255.0 ! -d 192.0.2.1 -j DROP"),
    Text("iptables", "filter", "INPUT", "--source 192.0.2.1 --destination 198.51.100.0/255.255.255.0 --jump ACCEPT"),
    Text("ip6tables", "filter", "INPUT", "-s 2001:DB8:0:0::1/64 -j ACCEPT"),
    Text("ip6tables", "filter", "INPUT", "-s ::ffff:192.0.2.1 ! -d fe80::/10 -j DROP"),
    Text(BOTH, "filter", "FORWARD", "-i eth+ ! -o lo -j ACCEPT"),
    Text(BOTH, "filter", "FORWARD", "--in-interface cni0 --out-interface eth0"),
    Text(BOTH, "filter", "INPUT", "-p 6 --syn -j DROP"),
    Text(BOTH, "filter", "INPUT", "! -p udp -m mark --mark 16 -j ACCEPT"),
    Text("iptables", "filter", "INPUT", "-f -j DROP"),
    Text(BOTH, "filter", "INPUT", "-p ah -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-p 112 -j ACCEPT"),
    # Ports.
    Text(BOTH, "filter", "INPUT", "-p tcp --dport ssh -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-p tcp --sport 1024: ! --dport :1023 -j DROP"),
    Text(BOTH, "filter", "INPUT", "-p tcp --tcp-flags ALL SYN,FIN -j DROP"),
    Text(BOTH, "filter", "INPUT", "-p tcp --tcp-option 8 -j DROP"),
    Text(BOTH, "filter", "INPUT", "-p udp --dport 53 --sport 1:65535 -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-p udp -m multiport --dports 53,67:68,123 -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-p tcp -m multiport ! --ports http,https -j DROP"),
    Text(BOTH, "filter", "INPUT", "-p sctp --dport 3868 -j ACCEPT"),
    Text("iptables", "filter", "INPUT", "-p icmp --icmp-type echo-request -j ACCEPT"),
    Text("iptables", "filter", "INPUT", "-p icmp --icmp-type 3/4 -j ACCEPT"),
    Text("iptables", "filter", "INPUT", "-p icmp --icmp-type any -j ACCEPT"),
    Text("ip6tables", "filter", "INPUT", "-p icmpv6 --icmpv6-type packet-too-big -j ACCEPT"),
    # Tracking, and other state.
    Text(BOTH, "filter", "FORWARD", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
    Text(BOTH, "filter", "FORWARD", "-m state --state INVALID,NEW -j DROP"),
    Text("iptables", "filter", "FORWARD", "-m conntrack --ctorigdst 10.90.0.1/24 -p tcp --ctorigdstport 31002 -j DROP"),
    Text(BOTH, "filter", "FORWARD", "-m conntrack --ctstate DNAT --ctdir REPLY --ctexpire 5:10"),
    Text(BOTH, "filter", "FORWARD", "-m connmark --mark 0x10/0xff -j ACCEPT"),
    Text(BOTH, "filter", "FORWARD", "-m connbytes --connbytes 1000: --connbytes-dir both --connbytes-mode bytes"),
    Text(BOTH, "filter", "INPUT", "-p tcp -m connlimit --connlimit-above 16 -j REJECT --reject-with tcp-reset"),
    Text(BOTH, "filter", "INPUT", "-m helper --helper ftp -j ACCEPT"),
    # Rates and chances: what packets use up is no drift.
    Text(BOTH, "filter", "INPUT", "-p udp -m limit --limit 5/s -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-m limit --limit 90/hour --limit-burst 3 -j LOG --log-prefix spaced\\ out"),
    Text(BOTH, "filter", "INPUT", "-m hashlimit --hashlimit-upto 10/min --hashlimit-mode srcip --hashlimit-name one"),
    Text(BOTH, "filter", "INPUT", "-m statistic --mode random --probability 0.25"),
    Text(BOTH, "filter", "INPUT", "-m statistic --mode nth --every 3 --packet 1"),
    Text(BOTH, "filter", "INPUT", "-m quota --quota 1000000 -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-m recent --name seen --set"),
    Text(BOTH, "filter", "INPUT", "-m recent --name seen --update --seconds 60 --hitcount 4 -j DROP"),
    # Other matches.
    Text(BOTH, "filter", "INPUT", '-m comment --comment "a \\"quoted\\" comment" -j ACCEPT'),
    Text(BOTH, "filter", "INPUT", "-m addrtype --dst-type LOCAL,MULTICAST ! --src-type UNICAST"),
    Text("iptables", "filter", "INPUT", "-m iprange --src-range 10.0.0.1-10.0.0.9 -j DROP"),
    Text("ip6tables", "filter", "INPUT", "-m iprange ! --dst-range 2001:db8::1-2001:db8::9 -j DROP"),
    Text(BOTH, "filter", "INPUT", "-m mac --mac-source 0:a:B:c:D:e -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-m length --length 64:1500 -m pkttype --pkt-type broadcast"),
    Text(BOTH, "filter", "INPUT", "-m time --timestart 8:00 --timestop 17:30 --weekdays Mon,Tue -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", '-p udp -m string --string "GET /x" --algo bm --to 100 -j DROP'),
    Text(BOTH, "filter", "INPUT", "-m u32 --u32 0>>22&0x3C@4=0x1:0x5 -j DROP"),
    Text(BOTH, "filter", "INPUT", "-m dscp --dscp-class EF"),
    Text(BOTH, "filter", "INPUT", "-m tos --tos Minimize-Delay"),
    Text("iptables", "filter", "INPUT", "-m ttl --ttl-lt 2 -j DROP"),
    Text("ip6tables", "filter", "INPUT", "-m hl --hl-eq 255 -j ACCEPT"),
    Text(BOTH, "filter", "INPUT", "-p tcp -m tcpmss --mss 1:500 -j DROP"),
    Text(BOTH, "filter", "INPUT", "-m set ! --match-set hosts src -j DROP"),
    Text(BOTH, "filter", "OUTPUT", "-m owner --uid-owner root ! --gid-owner 1000-2000"),
    Text(BOTH, "filter", "OUTPUT", "-m cgroup --cgroup 1 -j ACCEPT"),
    Text(BOTH, "filter", "FORWARD", "-m policy --dir in --pol ipsec --proto esp --mode transport"),
    Text("ip6tables", "filter", "INPUT", "-m frag --fragfirst"),
    Text("ip6tables", "filter", "INPUT", "-m rt --rt-type 0 -j DROP"),
    # Targets.
    Text("iptables", "filter", "INPUT", "-p tcp -j REJECT"),
    Text("ip6tables", "filter", "INPUT", "-j REJECT --reject-with adm-prohibited"),
    Text(BOTH, "filter", "INPUT", "-j LOG --log-level info --log-ip-options --log-prefix nodewall"),
    Text(BOTH, "filter", "INPUT", "-j NFLOG --nflog-group 5 --nflog-prefix x"),
    Text(BOTH, "filter", "INPUT", "-j NFQUEUE --queue-balance 0:3 --queue-bypass"),
    Text(BOTH, "filter", "INPUT", "-p tcp --dport 8443 -j RETURN"),
    Text(BOTH, "filter", "FORWARD", "-m mark --mark 0x7 -g OTHERS"),
    Text(BOTH, "filter", "FORWARD", "-m mark --mark 0x8 -j OTHERS"),
    Text(BOTH, "mangle", "PREROUTING", "-j MARK --set-mark 5"),
    Text(BOTH, "mangle", "PREROUTING", "-p tcp -j MARK --or-mark 0x4000"),
    Text(BOTH, "mangle", "PREROUTING", "-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff"),
    Text(BOTH, "mangle", "FORWARD", "-p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"),
    Text(BOTH, "mangle", "POSTROUTING", "-j CLASSIFY --set-class 1:ffff"),
    Text(BOTH, "mangle", "POSTROUTING", "-j DSCP --set-dscp-class CS3"),
    Text(BOTH, "mangle", "PREROUTING", "-j TOS --set-tos 0x10/0x3f"),
    Text("iptables", "mangle", "PREROUTING", "-j TTL --ttl-inc 1"),
    Text("ip6tables", "mangle", "PREROUTING", "-j HL --hl-set 64"),
    Text("iptables", "mangle", "PREROUTING", "-p tcp -j TPROXY --on-port 8080 --tproxy-mark 1"),
    Text("iptables", "mangle", "PREROUTING", "-j TEE --gateway 192.0.2.1"),
    Text(BOTH, "raw", "PREROUTING", "-p udp --dport 53 -j CT --notrack"),
    Text(BOTH, "raw", "PREROUTING", "-j NOTRACK"),
    Text(BOTH, "raw", "OUTPUT", "-j TRACE"),
    Text(BOTH, "security", "INPUT", "-j CONNSECMARK --restore"),
    Text("iptables", "nat", "PREROUTING", "-p tcp --dport 8080 -j DNAT --to-destination 10.42.0.2:80"),
    Text("iptables", "nat", "PREROUTING", "-p tcp -j DNAT --to 10.42.0.2-10.42.0.9 --random --persistent"),
    Text("ip6tables", "nat", "PREROUTING", "-p tcp -j DNAT --to-destination [fd42::2]:80"),
    Text(BOTH, "nat", "PREROUTING", "-p udp --dport 53 -j REDIRECT --to-ports 5353"),
    Text(BOTH, "nat", "POSTROUTING", "-o eth0 -j MASQUERADE --random-fully"),
    Text("iptables", "nat", "POSTROUTING", "-s 10.42.0.0/16 ! -d 10.42.0.0/16 -j SNAT --to-source 192.0.2.1"),
    Text("iptables", "nat", "PREROUTING", "-d 192.0.2.0/24 -j NETMAP --to 198.51.100.0/24"),
]

_FAMILIES = {"iptables": '["ipv4"]', "ip6tables": '["ipv6"]', BOTH: '["ipv4", "ipv6"]'}
_REFUSED_MAX = 0.03
"""Which part of the texts a kernel may refuse because it was built without their modules."""


def config(texts: Sequence[Text], *, without: frozenset[int] = frozenset()) -> str:
    lines = ['[daemon]\nresync = "1s"\n[set.hosts]\nentries = ["192.0.2.1", "2001:db8::1"]']
    for number, text in enumerate(texts):
        if number not in without:
            # A TOML basic string is a JSON string as far as these texts go.
            lines.append(
                f'[[rule]]\nname = "r{number}"\ntable = "{text.table}"\nchain = "{text.chain}"\n'
                f"rule = {json.dumps(text.rule)}\nfamilies = {_FAMILIES[text.tool]}"
            )
    return "\n".join(lines) + "\n"


def all_specs() -> list[Text]:
    if not SPECS.is_file():
        pytest.skip(f"{SPECS} is not here: the texts of iptables' own tests are no part of the project")
    rows = [line.split("\t") for line in SPECS.read_text().splitlines() if not line.startswith("#")]
    return list(dict.fromkeys(Text(*row[:4]) for row in rows))


def refused_here(daemon: Daemon) -> frozenset[int]:
    """The numbers of the texts that `nodewallctl check` says this kernel doesn't take."""
    found = json.loads(daemon.ctl("check", "--json", timeout=100).stdout)
    assert found["tried"], found["untried_reason"]
    return frozenset(int(error["key"].split(".")[1].removeprefix("r")) for error in found["errors"])


@pytest.fixture(params=["ours", "iptables' own"])
def texts(request: pytest.FixtureRequest) -> list[Text]:
    return TEXTS if request.param == "ours" else all_specs()


def test_no_rule_text_ever_looks_like_drift(node: Node, texts: list[Text]) -> None:
    for tool in TOOLS.values():
        node.run([tool, "-w", "-N", "OTHERS"])
    log = WriteLog(node)
    daemon = Daemon(node, config(texts), env=log.env, start=False)
    refused = refused_here(daemon)
    assert len(refused) <= len(texts) * _REFUSED_MAX, [texts[number] for number in sorted(refused)]
    daemon.configure(config(texts, without=refused))
    daemon.start()
    daemon.wait_ready()
    status = ask(daemon, "status")
    assert (status["state"], status["reasons"]) == ("enforcing", [])
    written, first = len(log), generation(node)
    assert written
    assert in_force(daemon)

    meddled = foreign_writes(node)
    packets(node)
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 2.5)  # two resyncs at least
    assert events(daemon, "repair", "degraded") == []
    assert len(log) == written
    if node.backend == "nft":
        assert generation(node) == first + meddled
    assert in_force(daemon)

    daemon.kill9()
    before = generation(node)
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon, "status")["state"] == "enforcing"
    assert len(log) == written
    assert generation(node) == before


def foreign_writes(node: Node) -> int:
    """A neighbour's rules come and go in every table, beside and below ours; returns how many transactions that was."""
    tables = ("raw", "mangle", "nat", "filter", "security")
    lines = []
    for tool in TOOLS.values():
        for table in tables:
            rules = f"{tool} -w -t {table}"
            own = ("-N FOREIGN", "-A FOREIGN -j RETURN", "-F FOREIGN", "-X FOREIGN")
            shared = "OUTPUT -p tcp --dport 9 -j ACCEPT"
            lines += [f"{rules} {what}" for what in (f"-A {shared}", *own, f"-D {shared}")]
    node.run("set -e\n" + "\n".join(lines))
    return len(lines)


def packets(node: Node) -> None:
    """Some traffic, so that counters, quotas, limits and lists of addresses are in use."""
    addresses = [(layout.LOOPBACK, "node"), (layout.NODE, "client"), (layout.BEYOND, "client")]
    probes = [
        Probe(ns, (address.of(family), port), protocol=protocol)
        for address, ns in addresses
        for family in FAMILIES
        for protocol, port in (("tcp", 22), ("udp", 53), ("udp", 9))
    ]
    connect_all(node, probes, timeout=0.05)
    counted = node.run("iptables-save -c | grep NODEWALL").stdout.splitlines()
    assert any(line.startswith("[") and not line.startswith("[0:0]") for line in counted)
