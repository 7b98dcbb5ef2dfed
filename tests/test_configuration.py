"""What a configuration means, and what is said of one that means nothing.

The files in `configuration/refused` carry what is expected beside each line: `#! KEY: message (cure)`.
"""

from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import pytest
from written import Write, problems, warnings

from nodewalld.configuration.load import load
from nodewalld.core.config import (
    Action,
    Anchor,
    AnchorKind,
    Config,
    DaemonConfig,
    Destination,
    Failsafe,
    ForwardEntry,
    Interfaces,
    JumpEntry,
    Place,
    PortEntry,
    PortRange,
    Position,
    ProtocolPorts,
    RuleEntry,
    Selector,
    SetEntry,
    SetFile,
    SetRef,
    ShieldMode,
    Where,
)
from nodewalld.core.words import Backend, Family, Table

CORPUS = Path(__file__).parent / "configuration"
EXPECTED = "  #! "


@pytest.mark.parametrize("path", sorted(CORPUS.glob("refused/*.toml")), ids=lambda path: path.stem)
def test_every_problem_names_its_line_its_key_and_its_cure(path: Path, write: Write) -> None:
    text = path.read_text()
    expected = [
        f"nodewalld.toml:{number}: {problem}"
        for number, line in enumerate(text.splitlines(), start=1)
        for problem in line.split(EXPECTED)[1:]
    ]
    assert problems(write(text)) == expected


ONCE = [
    ("[daemon]\nfamilies = []", "2: daemon.families: is empty, and no rule would be written"),
    ('[daemon]\nfamilies = ["ipv4", "ipv4"]', "2: daemon.families: says the same thing twice"),
    ('[daemon]\nfamilies = "ipv4"', "2: daemon.families: must be a list, not a string"),
    ('[daemon]\nresync = "30"', '2: daemon.resync: "30" is not a duration'),
    ('[daemon]\nresync = "-30s"', '2: daemon.resync: "-30s" is not a duration'),
    ('[daemon]\nresync = "999ms"', '2: daemon.resync: "999ms" is out of range ("1s" to "1h")'),
    ('[daemon]\nresync = "61m"', '2: daemon.resync: "61m" is out of range'),
    ("[daemon]\nmark = 0", "2: daemon.mark: 0 is not exactly one of 32 bits"),
    ("[daemon]\nmark = -1", "2: daemon.mark: -1 is not exactly one of 32 bits"),
    ("[daemon]\nmark = 0x100000000", "2: daemon.mark: 4294967296 is not exactly one of 32 bits"),
    ("[daemon]\nmark = true", "2: daemon.mark: must be a string, not a boolean"),
    ('[daemon]\nmark = "0x1000/0x1000"', '2: daemon.mark: "0x1000/0x1000" is not a mark'),
    ("[daemon]\nyield_to = 3", "2: daemon.yield_to: must be a list, not a number"),
    ("[failsafe]\nfrom = []", "2: failsafe.from: is empty, which could mean anything or nothing"),
    ('[failsafe]\nfrom = "any"', "2: failsafe.from: must be a list, not a string"),
    ("set.x = 3", "1: set.x: must be a table, not a number ([set.x])"),
    ("zone.a = 3", "1: zone.a: must be a table, not a number ([zone.a])"),
    (f"[daemon]\nx = {'9' * 5000}", "2: syntax: holds a number that is too long"),
    (f"[daemon]\nx = {'[' * 900}{']' * 900}", "1: file: is nested too deeply"),
    (f"[daemon]\nmark = 0x{'f' * 3000}", "2: daemon.mark: this number is not exactly one of 32 bits"),
]


@pytest.mark.parametrize(("text", "expected"), ONCE, ids=[text[:40] for text, _ in ONCE])
def test_what_can_stand_only_once_is_judged_as_strictly(text: str, expected: str, write: Write) -> None:
    [found] = problems(write(text))
    message, _, cure = expected.removesuffix(")").partition(" (")
    assert found.startswith(f"nodewalld.toml:{message}")
    assert cure in found


def test_the_contracts_example_means_what_the_contract_says(write: Write, tmp_path: Path) -> None:
    extra = tmp_path / "extra.txt"
    extra.write_text("# the office\n192.0.2.0/24  # first floor\n\n2001:db8::1\n172.18.10.1\n")
    extra.chmod(0o644)
    text = (CORPUS / "contract/nodewalld.toml").read_text().replace("/etc/nodewalld/sets/extra.txt", str(extra))
    folder = write(text)
    file = str(folder / "nodewalld.toml")
    nodes = SetRef("cluster_nodes")
    lines = {line.split("#")[0].strip(): number for number, line in enumerate(text.splitlines(), start=1)}
    written = Where(file, next(number for line, number in lines.items() if line.startswith("entries")))
    entries = ("172.18.10.1", "172.18.10.2", "172.18.10.3", "fd00:18::/64")
    in_file = ("192.0.2.0/24", "2001:db8::1", "172.18.10.1")
    config = load(folder)
    assert config.sets[0].networks == tuple(map(ip_network, (*entries, *in_file[:2])))
    assert config == Config(
        path=str(folder),
        daemon=DaemonConfig(),
        failsafe=Failsafe(),
        sets=(
            SetEntry(
                "cluster_nodes",
                tuple((ip_network(network), written) for network in entries),
                (SetFile(str(extra), tuple(map(ip_network, in_file))),),
                Where(file, lines["[set.cluster_nodes]"]),
            ),
        ),
        ports=(
            PortEntry(
                name="vault-nodeport",
                ports=(PortRange(31002, 31002), PortRange(32000, 32010)),
                protocols=("tcp",),
                allow=(IPv4Network("10.0.0.0/8"), nodes),
                deny=(),
                action=Action.DROP,
                redirect_to=65535,
                from_node=False,
                destination=Destination.LOCAL,
                log=False,
                enforce=True,
                where=Where(file, lines["[[port]]"]),
            ),
        ),
        forwards=(
            ForwardEntry(
                name="pods-from-nodes",
                inside=Interfaces(("ens18",)),
                outside=Interfaces(),
                source=Selector((nodes,), negated=True),
                destination=Selector(),
                protocol="",
                ports=(),
                action=Action.REJECT,
                position=Position(
                    Place.BETWEEN,
                    after=(Anchor(AnchorKind.RULE, "-s 10.42.0.0/16 -j ACCEPT"),),
                    before=(Anchor(AnchorKind.RULE, "-d 10.42.0.0/16 -j ACCEPT"),),
                ),
                log=False,
                enforce=True,
                where=Where(file, lines["[[forward]]"]),
            ),
        ),
        rules=(
            RuleEntry(
                name="local-vault",
                table=Table.MANGLE,
                chain="OUTPUT",
                text="-p tcp --dport 31002 -j DROP",
                families=(Family.IPV4, Family.IPV6),
                position=Position(Place.FIRST),
                enforce=True,
                where=Where(file, lines["[[rule]]"]),
            ),
        ),
        jumps=(
            JumpEntry(
                name="docker-user",
                table=Table.FILTER,
                from_chain="FORWARD",
                to_chain="DOCKER-USER",
                families=(Family.IPV4, Family.IPV6),
                position=Position(),
                where=Where(file, lines["[[jump]]"]),
            ),
        ),
    )


def test_an_empty_file_means_all_defaults(write: Write) -> None:
    folder = write("")
    assert load(folder) == Config(path=str(folder))


def test_the_daemon_and_the_failsafe_take_every_value_of_the_contract(write: Write) -> None:
    config = load(
        write(
            '[daemon]\nbackend = "legacy"\nfamilies = ["ipv6"]\nresync = "1.5m"\nyield_to = []\nmark = 4096\n'
            'metrics = "/var/lib/node_exporter"\nshield = "require"\n'
            '[failsafe]\nports = ["22/tcp", "60000-61000/udp"]\n'
            'from = ["10.0.0.0/8", "@admins"]\n[set.admins]\n'
        )
    )
    folder = "/var/lib/node_exporter"
    required = ShieldMode.REQUIRE
    assert config.daemon == DaemonConfig(Backend.LEGACY, (Family.IPV6,), 90.0, (), 0x1000, folder, required)
    assert config.failsafe == Failsafe(
        (ProtocolPorts("tcp", PortRange(22, 22)), ProtocolPorts("udp", PortRange(60000, 61000))),
        Selector((IPv4Network("10.0.0.0/8"), SetRef("admins"))),
    )


PORT = [
    ("protocol", '"udp"', "protocols", ("udp",)),
    ("protocol", '["tcp", "sctp"]', "protocols", ("tcp", "sctp")),
    ("allow", '"any"', "allow", (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))),
    ("allow", '["10.1.2.3", "fd00::/8"]', "allow", (IPv4Network("10.1.2.3/32"), IPv6Network("fd00::/8"))),
    ("destination", '"any"', "destination", Destination.ANY),
    ("destination", '["local"]', "destination", Destination.LOCAL),
    ("destination", '"203.0.113.9"', "destination", (IPv4Network("203.0.113.9/32"),)),
    ("action", '"redirect"', "redirect_to", 65535),
    ("action", '"redirect:1025"', "redirect_to", 1025),
    ("action", '"redirect:1025"', "action", Action.REDIRECT),
    ("from_node", "true", "from_node", True),
    ("enforce", "false", "enforce", False),
    ("log", "true", "log", True),
]


@pytest.mark.parametrize(("key", "value", "field", "expected"), PORT)
def test_a_port_takes(key: str, value: str, field: str, expected: object, write: Write) -> None:
    [port] = load(write(f'[[port]]\nname = "p"\nports = ["1:2", "443"]\n{key} = {value}')).ports
    assert port.ports == (PortRange(1, 2), PortRange(443, 443))
    assert getattr(port, field) == expected


FORWARD = [
    ("in", '["!ens18", "! cni+"]', "inside", Interfaces(("ens18", "cni+"), negated=True)),
    ("in", '"@default-route"', "inside", Interfaces(("@default-route",))),
    ("in", '"fifteen-letters"', "inside", Interfaces(("fifteen-letters",))),
    ("out", '[""]', "outside", Interfaces()),
    ("source", '"!10.0.0.0/8"', "source", Selector((IPv4Network("10.0.0.0/8"),), negated=True)),
    ("source", '""', "source", Selector()),
    ("destination", '["@s", "fd00::1"]', "destination", Selector((SetRef("s"), IPv6Network("fd00::1/128")))),
    ("protocol", '"ICMP"', "protocol", "icmp"),
    ("protocol", '"ipv6-icmp"', "protocol", "icmpv6"),
    ("protocol", '"ipip"', "protocol", "4"),
    ("protocol", '"vrrp"', "protocol", "112"),
    ("protocol", "50", "protocol", "esp"),
    ("protocol", '"47"', "protocol", "47"),
    ("protocol", '"tcp"\nports = [22]', "ports", (PortRange(22, 22),)),
    ("position", '"last"', "position", Position(Place.LAST)),
    ("log", "true", "log", True),
]


@pytest.mark.parametrize(("key", "value", "field", "expected"), FORWARD)
def test_a_forward_takes(key: str, value: str, field: str, expected: object, write: Write) -> None:
    [forward] = load(write(f'set.s = {{}}\n[[forward]]\nname = "f"\naction = "accept"\n{key} = {value}')).forwards
    assert getattr(forward, field) == expected


def test_a_position_takes_targets_rules_and_comments_alone_or_in_lists(write: Write) -> None:
    text = (
        '[[jump]]\nname = "j"\ntable = "filter"\nfrom = "INPUT"\nto = "MINE"\nenforce = true\n'
        'position = { after = "KUBE-*", before = '
        '["DOCKER", { comment = "cali:*" }, { rule = "-A INPUT -i lo -j X" }] }\n'
        '[[jump]]\nname = "k"\ntable = "filter"\nfrom = "INPUT"\nto = "YOURS"\nposition = { after = { comment = "x" } }'
    )
    first, second = load(write(text)).jumps
    assert first.position == Position(
        Place.BETWEEN,
        (Anchor(AnchorKind.TARGET, "KUBE-*"),),
        (
            Anchor(AnchorKind.TARGET, "DOCKER"),
            Anchor(AnchorKind.COMMENT, "cali:*"),
            Anchor(AnchorKind.RULE, "-i lo -j X"),
        ),
    )
    assert second.position == Position(Place.BETWEEN, (Anchor(AnchorKind.COMMENT, "x"),))


RULES = [
    "-p tcp --dport 22 -j ACCEPT",
    "-p tcp --tcp-flags SYN,RST SYN -c 10 20 -j TCPMSS --clamp-mss-to-pmtu",
    "-m policy --dir in --pol ipsec -j RETURN",
    '-m comment --comment "-A INPUT -j DROP" -j ACCEPT',
    "-m comment --comment -F -j ACCEPT",
    '-m string --algo bm --string "-t nat" -j DROP',
    "-m set --match-set of-somebody-else src -j DROP",
    "-m statistic --mode nth --every 2 -m limit --limit 5/min -m tos --tos 8 -j MARK --set-mark 1",
    "-m recent --name x --rcheck --seconds 5 -g DOCKER-USER",
    "-m time --timestart 09:00 --weekdays Mon -j calico-like",
    "-i eth0",
]


@pytest.mark.parametrize("text", RULES)
def test_a_rule_may_say_what_only_resembles_a_command(text: str, write: Write) -> None:
    [rule] = load(write(f"[[rule]]\nname = 'r'\ntable = 'filter'\nchain = 'DOCKER-USER'\nrule = '{text}'")).rules
    assert rule.text == text
    assert rule.families == (Family.IPV4, Family.IPV6)


FAMILIES = [
    ("-s 10.0.0.0/8 -j DROP", "", "ipv4"),
    ("-s 10.0.0.0/255.0.0.0 -j DROP", "", "ipv4"),
    ("--source=10.0.0.1,10.0.0.2 -j DROP", "", "ipv4"),
    ("! -d fd00::/8 -j DROP", "", "ipv6"),
    ("-j DNAT --to-destination 10.0.0.1:8080-8090", "", "ipv4"),
    ("-j DNAT --to-destination [fd00::1]:80", "", "ipv6"),
    ("-d 2001:db8::/32 -j NETMAP --to 2001:db8:1::/32", "", "ipv6"),
    ("-j SNAT --to-source 10.0.0.1-10.0.0.9", "", "ipv4"),
    ("-m mac --mac-source 00:11:22:33:44:55 -p tcp --dport 80:90 -j DROP", "", "ipv4 ipv6"),
    ("-m comment --comment 10.0.0.1 -j DROP", "", "ipv4 ipv6"),
    ("-s 10.0.0.1 -d fd00::1 -j DROP", "", "ipv4 ipv6"),
    ("-s 10.0.0.1 -j DROP", 'families = ["ipv6", "ipv4"]', "ipv6 ipv4"),
]


@pytest.mark.parametrize(("text", "families", "expected"), FAMILIES)
def test_addresses_in_a_rule_narrow_its_families(text: str, families: str, expected: str, write: Write) -> None:
    rule = f"[[rule]]\nname = 'r'\ntable = 'nat'\nchain = 'OUTPUT'\nrule = '{text}'\n{families}"
    [entry] = load(write(rule)).rules
    assert entry.families == tuple(Family(family) for family in expected.split())


def test_families_that_the_daemon_has_not_are_taken_out_and_warned_of_when_none_is_left(write: Write) -> None:
    folder = write(
        "daemon.families = ['ipv4']\n"
        "[[rule]]\nname = 'a'\ntable = 'nat'\nchain = 'OUTPUT'\nrule = '-j ACCEPT'\n"
        "[[rule]]\nname = 'b'\ntable = 'nat'\nchain = 'OUTPUT'\nrule = '-s fd00::1 -j ACCEPT'\n"
        "[[jump]]\nname = 'c'\ntable = 'nat'\nfrom = 'OUTPUT'\nto = 'X'\nfamilies = ['ipv6']\n"
    )
    config = load(folder)
    assert [rule.families for rule in config.rules] == [(Family.IPV4,), ()]
    assert [jump.families for jump in config.jumps] == [()]
    says = 'none of these is in daemon.families: it is never written (add "ipv6" to daemon.families)'
    assert warnings(folder) == [
        f"nodewalld.toml:7: rule.b.families: {says} [family-off]",
        f"nodewalld.toml:17: jump.c.families: {says} [family-off]",
    ]


@pytest.mark.parametrize(
    ("mark", "users"),
    [
        ("0x4000", "kube-proxy"),
        ("0x8000", "kube-proxy"),
        ("0x2000", "portmap"),
        ("0x10000", "kube-router, Calico, Tailscale"),
        ("0x1000000", "Calico"),
        ("0x800", ""),
    ],
)
def test_a_mark_that_a_neighbour_uses_is_warned_of(mark: str, users: str, write: Write) -> None:
    expected = f'nodewalld.toml:2: daemon.mark: {mark} is in use by {users} ("0x1000" is free of them) [mark-in-use]'
    assert warnings(write(f'[daemon]\nmark = "{mark}"')) == ([expected] if users else [])


def test_what_leaves_no_way_in_is_warned_of(write: Write) -> None:
    text = "[failsafe]\nports = []\n[[port]]\nname = 'p'\nports = [1]\ndeny = ['10.0.0.1']"
    pointless = 'port.p.deny: is taken out of allow, and allow is empty (allow = ["any"]) [deny-outside-allow]'
    assert warnings(write(text)) == [
        'nodewalld.toml:2: failsafe.ports: is empty: nothing keeps a way back in (["22/tcp"]) [no-failsafe]',
        f"nodewalld.toml:6: {pointless}",
    ]
