"""Walking a packet as a value through rules as text: what decides, what forks, and what can't be told."""

import pytest
from captured import CAPTURES
from test_specs import TEXTS
from worlds import number, packet, routes, world

from nodewalld.core.words import Backend, Family
from nodewalld.walk import ICMP, ICMPV6, UDP, Outcome, Route, Tracked, Unread, Verdict, judge, read, read_sets
from nodewalld.walk.rules import Chain

SEED = "-A INPUT -p tcp -m tcp --dport 31002 -j DROP\n"
KUBE = (CAPTURES / "kp126-nft-3svc.v4.save").read_text()


def filtered(*rules: str, policy: str = "ACCEPT") -> str:
    """A filter table with these rules (in INPUT, unless they say so)."""
    lines = [rule if rule.startswith(("-A", ":")) else f"-A INPUT {rule}" for rule in rules]
    chains = [f":INPUT {policy} [0:0]", ":FORWARD ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]"]
    return "\n".join(
        ("*filter", *chains, *(c for c in lines if c[0] == ":"), *(r for r in lines if r[0] == "-"), "COMMIT")
    )


def asked(text: str, *where: object, **more: object) -> Verdict:
    return judge(packet(*where, **more), world(text))  # type: ignore[arg-type]


def test_a_drop_in_input_cannot_see_what_kube_proxy_rewrites() -> None:
    verdict = asked(KUBE.replace("*filter\n", f"*filter\n{SEED}"), "203.0.113.9", "10.90.0.1", 31002)
    assert verdict.passes
    assert verdict.outcomes == {Outcome.FORWARDED}
    assert {path.end.text for path in verdict.paths if path.end} == {
        "to 10.42.0.2:8080 by cni0",
        "to 10.42.0.3:8080 by cni0",
    }


def test_a_drop_in_mangle_stops_it() -> None:
    text = KUBE.replace("*mangle\n", f"*mangle\n{SEED.replace('INPUT', 'PREROUTING')}")
    verdict = asked(text, "203.0.113.9", "10.90.0.1", 31002)
    assert verdict.passes is False
    assert [(rule.chain, rule.number) for rule in verdict.deciders] == [("PREROUTING", 1)]


def test_a_drop_in_either_backend_is_final() -> None:
    rules = {Backend.NFT: read(filtered("-j ACCEPT")), Backend.LEGACY: read(filtered("-j DROP"))}
    assert judge(packet("203.0.113.9", "10.90.0.1", 80), world("", rules=rules)).passes is False


def test_where_the_order_of_the_backends_matters_both_are_possible() -> None:
    nat = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination {}\nCOMMIT\n"
    rules = {Backend.NFT: read(nat.format("10.42.0.2:80")), Backend.LEGACY: read(nat.format("10.42.0.3:80"))}
    verdict = judge(packet("203.0.113.9", "10.90.0.1", 80), world("", rules=rules))
    assert verdict.passes
    ends = {path.supposed[0].text: path.end.text for path in verdict.paths if path.end}
    assert ends == {
        "the kernel asks nft first": "to 10.42.0.2:80 by cni0",
        "the kernel asks legacy first": "to 10.42.0.3:80 by cni0",
    }


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ("-s 203.0.113.0/24 -j DROP", False),
        ("! -s 203.0.113.0/24 -j DROP", True),
        ("-s 0.0.113.9/0.0.255.255 -j DROP", False),
        ("-i ens+ -j DROP", False),
        ("! -i ens18 -j DROP", True),
        ("-i ens1 -j DROP", True),
        ("-p udp -j DROP", True),
        ("-p 6 -j DROP", False),
        ("-p tcp -m tcp --dport 80:90 -j DROP", False),
        ("-p tcp -m tcp ! --dport 80 -j DROP", True),
        ("-p tcp --dport 80 -j DROP", False),
        ("-p tcp -m tcp --sport 1:1023 -j DROP", True),
        ("-p tcp -m tcp --sport 40000 -j DROP", None),
        ("-p tcp -m multiport --dports 22,80:81 -j DROP", False),
        ("-p tcp -m multiport ! --dports 22,80:81 -j DROP", True),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j DROP", False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j DROP", True),
        ("-m conntrack ! --ctstate ESTABLISHED -j DROP", False),
        ("-m state --state NEW -j REJECT --reject-with icmp-port-unreachable", False),
        ("-m conntrack --ctstate DNAT -j DROP", True),
        ("-m conntrack --ctdir REPLY -j DROP", True),
        ("-p tcp -m conntrack --ctorigdstport 80 -j DROP", False),
        ("-p tcp -m conntrack --ctorigdstport :79 -j DROP", True),
        ("-m addrtype --dst-type LOCAL -j DROP", False),
        ("-m addrtype ! --dst-type LOCAL,BROADCAST -j DROP", True),
        ("-m addrtype --src-type UNICAST -j DROP", False),
        ("-m iprange --src-range 203.0.113.1-203.0.113.8 -j DROP", True),
        ("-m mark --mark 0x0/0xff -j DROP", False),
        ("-m mark ! --mark 0x0 -j DROP", True),
        ("-m pkttype --pkt-type unicast -j DROP", False),
        ("-m owner --uid-owner 0 -j DROP", True),
        ('-m comment --comment "a \\"b\\" -j ACCEPT" -j DROP', False),
        ("-m statistic --mode random --probability 0.5 -j DROP", None),
        ("-m limit --limit 1/sec -j DROP", None),
        ("-m recent --rcheck --name x --rsource -j DROP", None),
        ("-m set --match-set nowhere src -j DROP", None),
        ("-m u32 --u32 0x0=0x1 -j DROP", None),
        ("-m statistic --mode random --probability 0.5 -j LOG", True),
        ("-j NFQUEUE --queue-num 0", None),
        ("-j NOBODYKNOWS", None),
        ("-p udp -j NOBODYKNOWS", True),
        ("", True),
    ],
)
def test_a_rule_is_judged_as_the_kernel_would(rule: str, passes: bool | None) -> None:
    assert asked(filtered(rule), "203.0.113.9", "10.90.0.1", 80).passes is passes


def test_the_policy_decides_when_no_rule_does() -> None:
    verdict = asked(filtered(policy="DROP"), "203.0.113.9", "10.90.0.1", 80)
    assert verdict.passes is False
    assert not verdict.deciders
    assert verdict.paths[0].end is not None
    assert verdict.paths[0].end.text == "the policy of filter INPUT"


def test_return_and_goto_go_where_the_kernel_goes() -> None:
    chains = (":a - [0:0]", ":b - [0:0]")
    through = asked(
        filtered(*chains, "-j a", "-j DROP", "-A a -g b", "-A a -j ACCEPT", "-A b -j RETURN"), "", "10.90.0.1"
    )
    assert through.passes is False  # b returns to where a was called from, not into a
    base = asked(filtered(*chains, "-g b", "-j DROP"), "203.0.113.9", "10.90.0.1", 80)
    assert base.passes  # from a built-in chain, to its policy


def test_ways_that_end_alike_are_decided() -> None:
    unknown = "-m recent --rcheck --name x --rsource"
    verdict = asked(filtered(f"{unknown} -j DROP", "-j REJECT"), "203.0.113.9", "10.90.0.1", 80)
    assert verdict.passes is False
    assert verdict.outcomes == {Outcome.DROPPED, Outcome.REJECTED}


def test_what_is_supposed_of_a_set_is_supposed_for_good() -> None:
    rules = ("-m set --match-set s src -j MARK --set-mark 1", "-m set ! --match-set s src -m mark --mark 1 -j DROP")
    text = filtered(*rules).replace("*filter", "*mangle")
    assert asked(text, "203.0.113.9", "10.90.0.1", 80).passes
    assert (
        asked(
            text.replace("-m set --match-set s src -j MARK", "-m limit --limit 1/sec -j MARK"),
            "203.0.113.9",
            "10.90.0.1",
            80,
        ).passes
        is None
    )


def test_many_unknown_conditions_stay_few_ways() -> None:
    chains = tuple(f":c{n} - [0:0]" for n in range(200))
    jumps = tuple(f"-m set --match-set s{n} src -j c{n}" for n in range(200))
    verdict = asked(filtered(*chains, *jumps, "-j DROP"), "203.0.113.9", "10.90.0.1", 80)
    assert verdict.passes is False
    assert len(verdict.paths) < 200


@pytest.mark.parametrize(
    ("kind", "element", "sides", "inside"),
    [
        ("hash:ip family inet", "203.0.113.9", "src", True),
        ("hash:ip family inet", "203.0.113.8", "src", False),
        ("hash:ip family inet netmask 24", "203.0.113.0", "src", True),
        ("hash:net family inet", "203.0.113.0/24", "src", True),
        ("hash:net family inet6", "2001:db8::/32", "src", False),
        ("hash:ip,port family inet", "10.90.0.1,tcp:80", "dst,dst", True),
        ("hash:ip,port family inet", "10.90.0.1,udp:80", "dst,dst", False),
        ("hash:ip,port,ip family inet", "10.90.0.1,tcp:80,203.0.113.9", "dst,dst,src", True),
        ("hash:net,port family inet", "203.0.113.0/24,tcp:80", "src,dst", True),
        ("hash:net,iface family inet", "203.0.113.0/24,ens18", "src,src", True),
        ("hash:net,net family inet", "203.0.113.0/24,10.0.0.0/8", "src,dst", True),
        ("hash:ip,port family inet", "10.90.0.1,tcp:80", "dst", False),
        ("bitmap:port range 0-65535", "80", "dst", True),
        ("hash:mac", "00:11:22:33:44:55", "src", None),
    ],
)
def test_a_set_holds_what_the_kernel_says(kind: str, element: str, sides: str, inside: bool | None) -> None:
    sets = read_sets(f"create s {kind}\nadd s {element}\ncreate l list:set size 8\nadd l s\n")
    for name in ("s", "l"):
        text = filtered(f"-m set --match-set {name} {sides} -j DROP")
        verdict = judge(packet("203.0.113.9", "10.90.0.1", 80), world(text, sets=sets))
        assert verdict.passes is (None if inside is None else not inside)


def test_the_longest_prefix_of_a_set_decides() -> None:
    sets = read_sets("create s hash:net family inet\nadd s 203.0.0.0/8\nadd s 203.0.113.0/24 nomatch\n")
    text = filtered("-m set --match-set s src -j DROP")
    assert judge(packet("203.0.113.9", "10.90.0.1", 80), world(text, sets=sets)).passes
    assert judge(packet("203.0.114.9", "10.90.0.1", 80), world(text, sets=sets)).passes is False


def test_marks_travel_and_routing_hears_of_them() -> None:
    text = "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j MARK --set-xmark 0x10/0xff\nCOMMIT\n"
    text += filtered("-m mark --mark 0x10/0xff -j DROP")
    assert asked(text, "203.0.113.9", "10.90.0.1", 80, mark=0x105).passes is False


def test_xmark_turns_bits_over() -> None:
    """As in kube-proxy's KUBE-POSTROUTING, which takes its mark away by --set-xmark 0x4000/0x0."""
    text = "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j MARK --set-xmark 0x4000/0x0\nCOMMIT\n"
    text += filtered("-m mark --mark 0x4000/0x4000 -j DROP")
    assert asked(text, "203.0.113.9", "10.90.0.1", 80, mark=0x4001).passes
    assert asked(text, "203.0.113.9", "10.90.0.1", 80, mark=0x1).passes is False


@pytest.mark.parametrize("family", Family)
def test_no_rule_text_is_too_strange_to_be_walked(family: Family) -> None:
    source, to = ("203.0.113.9", "10.90.0.1") if family is Family.IPV4 else ("2001:db8::9", "fd90::1")
    icmp = {"icmp": (8, 0), "protocol": ICMP} if family is Family.IPV4 else {"icmp": (128, 0), "protocol": ICMPV6}
    assert len(TEXTS) > 80
    for text in TEXTS:
        rules = "".join(
            f"*{table}\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING {text.rule}\nCOMMIT\n" for table in ("mangle", "nat")
        )
        for more in ({"port": 80}, {"port": 80, "protocol": UDP}, icmp):
            judge(packet(source, to, **more), world(rules, family=family))  # type: ignore[arg-type]


def test_untracked_packets_have_no_flow() -> None:
    text = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j CT --notrack\nCOMMIT\n"
    where = ("203.0.113.9", "10.90.0.1", 80)
    assert asked(text + filtered("-m conntrack --ctstate UNTRACKED -j DROP"), *where).passes is False
    assert asked(text + filtered("-m conntrack --ctdir ORIGINAL -j DROP"), *where).passes
    assert asked(text + filtered("-m conntrack ! --ctstate NEW --ctdir REPLY -j DROP"), *where).passes is False


def test_the_node_reaches_its_own_nodeport_over_output() -> None:
    verdict = asked(KUBE, "", "10.90.0.1", 31002, from_node=True)
    assert verdict.outcomes == {Outcome.SENT}
    assert {step.hook for path in verdict.paths for step in path.steps} == {
        "OUTPUT",
        "routing",
        "FORWARD",
        "POSTROUTING",
    } - {"FORWARD"}


def test_the_node_reaches_itself_over_lo() -> None:
    verdict = asked(filtered("-i lo -j DROP"), "", "127.0.0.1", 80, from_node=True)
    assert verdict.passes is False
    assert asked(filtered("-A OUTPUT -o lo -j DROP"), "", "10.90.0.1", 80, from_node=True).passes is False


def test_routing_refuses_what_the_kernel_refuses() -> None:
    closed = {"ens18": False}
    assert judge(packet("203.0.113.9", "198.51.100.2", 80), world("", forwarding=closed)).passes is False
    assert asked("", "203.0.113.9", "198.51.100.2", 80).outcomes == {Outcome.FORWARDED}
    assert asked("", "203.0.113.9", "127.0.0.1", 80).passes is False
    strict = {"eth1": 1}
    assert judge(packet("203.0.113.9", "10.90.0.1", 80, inside="eth1"), world("", reverse_path=strict)).passes is False
    assert judge(packet("198.51.100.2", "10.90.0.1", 80, inside="eth1"), world("", reverse_path=strict)).passes


def test_an_established_flow_goes_where_its_first_packet_would_go_today() -> None:
    text = KUBE.replace("*filter\n", "*filter\n-A FORWARD -m conntrack --ctstate ESTABLISHED -j DROP\n")
    verdict = asked(text, "203.0.113.9", "10.90.0.1", 31002, tracked=Tracked.ESTABLISHED)
    assert verdict.passes is False
    assert [rule.number for rule in verdict.deciders] == [1]
    assert {path.state.destination_ports for path in verdict.paths} == {(8080, 8080)}


def test_a_return_in_a_built_in_chain_is_its_policy() -> None:
    assert asked(filtered("-j RETURN", "-j ACCEPT", policy="DROP"), "203.0.113.9", "10.90.0.1", 80).passes is False


def test_what_is_bound_without_a_change_is_not_dnat() -> None:
    nat = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination 10.90.0.1:{}\nCOMMIT\n"
    text = filtered("-m conntrack --ctstate DNAT -j DROP")
    assert asked(nat.format(80) + text, "203.0.113.9", "10.90.0.1", 80).passes
    assert asked(nat.format(81) + text, "203.0.113.9", "10.90.0.1", 80).passes is False


def test_the_route_with_the_lowest_metric_is_taken() -> None:
    more = (Route(0, 0, "eth1", metric=100), Route(0, 0, "wlan0", metric=600))
    known = routes({"ens18": ("10.90.0.1/24",)}, more=more)
    verdict = judge(packet("10.90.0.7", "192.0.2.1", 80), world("", routes=known))
    assert [path.end.text for path in verdict.paths if path.end] == ["to 192.0.2.1:80 by eth1"]


def test_a_redirect_leads_to_an_address_of_the_scope_that_was_dialled() -> None:
    nat = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j REDIRECT --to-ports 8080\nCOMMIT\n"
    known = routes({"ens18": ("fe80::5/64", "fd90::1/64")})
    groups = {"ens18": frozenset({number("ff02::2")})}
    where = world(nat, family=Family.IPV6, routes=known, groups=groups)
    for dialled, answering in (("fd90::1", "fd90::1"), ("fe80::5", "fe80::5"), ("ff02::2", "fe80::5")):
        verdict = judge(packet("fd90::7", dialled, 80), where)
        assert {path.state.destination for path in verdict.paths} == {number(answering)}


def test_icmp_that_begins_nothing_is_invalid() -> None:
    text = filtered("-m conntrack --ctstate INVALID -j DROP")
    assert asked(text, "203.0.113.9", "10.90.0.1", protocol=ICMP, icmp=(8, 0)).passes
    assert asked(text, "203.0.113.9", "10.90.0.1", protocol=ICMP, icmp=(3, 3)).passes is False


def test_a_chain_that_is_not_understood_leaves_a_doubt_unless_the_packet_is_stopped_anyway() -> None:
    others = (Unread("table inet firewalld, chain filter_INPUT", "INPUT", 10),)
    verdict = judge(packet("203.0.113.9", "10.90.0.1", 53, UDP), world("", others=others))
    assert verdict.passes is None
    assert verdict.paths[0].doubts == ("table inet firewalld, chain filter_INPUT",)
    assert judge(packet("203.0.113.9", "10.90.0.1", 53), world(filtered("-j DROP"), others=others)).passes is False
    assert judge(packet("203.0.113.9", "198.51.100.2", 53), world("", others=others)).passes


def test_ipv6_is_walked_alike() -> None:
    text = (CAPTURES / "kp126-nft-3svc.v6.save").read_text()
    verdict = judge(packet("2001:db8:c::9", "fd90::1", 31002), world(text, family=Family.IPV6))
    assert verdict.outcomes == {Outcome.FORWARDED}


def test_what_came_as_everybodys_is_not_forwarded_whatever_nat_makes_of_it() -> None:
    nat = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination 10.42.0.2:80\nCOMMIT\n"
    assert asked(nat, "203.0.113.9", "10.90.0.255", 80).passes is False
    assert asked(nat, "203.0.113.9", "10.90.0.1", 80).outcomes == {Outcome.FORWARDED}
    assert asked(filtered("-m pkttype --pkt-type broadcast -j DROP"), "203.0.113.9", "10.90.0.255", 80).passes is False


def test_without_a_flow_a_connmark_matches_neither_way() -> None:
    text = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j CT --notrack\nCOMMIT\n"
    text += filtered("-m connmark ! --mark 0x1 -j DROP", "-m connmark --mark 0x0 -j DROP")
    assert asked(text, "203.0.113.9", "10.90.0.1", 80).passes


def test_of_rules_for_one_port_each_only_those_for_the_packets_port_are_looked_at() -> None:
    texts = [f"-p tcp -m tcp --dport {port} -j ACCEPT" for port in range(100)]
    texts[40:40] = ["-p tcp -m tcp ! --dport 7 -j LOG", '-m comment --comment "--dport 9" -j LOG']
    texts += ["-p tcp -m tcp --dport 7:8 -j LOG", "-p tcp -m multiport --dports 7,9 -j LOG", "-p udp -m udp --dport 7"]
    chain = Chain("big", "", texts)

    def met(ports: tuple[int, int]) -> list[int]:
        found, index = [], chain.following(0, ports)
        while index < len(texts):
            found.append(index)
            index = chain.following(index + 1, ports)
        return found

    assert met((7, 7)) == [7, 40, 41, 102, 103, 104]
    assert met((50, 50)) == [40, 41, 52, 102, 103]
    assert met((7, 9)) == list(range(len(texts)))
