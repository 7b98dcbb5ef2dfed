"""What a configuration means, and what is said of one that means nothing.

The files in `configuration/refused` carry what is expected beside each line: `#! KEY: message (cure)`.
"""

import os
import shutil
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import pytest

from nodewalld.configuration.errors import ConfigError
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
    Problem,
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

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a folder from texts: the main file, and files of conf.d by name."""

    def make(main: str | bytes | None = "", **more: str | bytes) -> Path:
        folder = tmp_path / "etc"
        (folder / "conf.d").mkdir(parents=True)
        texts = {"nodewalld.toml": main, **{f"conf.d/{name}.toml": text for name, text in more.items()}}
        for name, text in texts.items():
            if text is not None:
                (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return folder

    return make


def problems(folder: Path, *, check_owner: bool = True) -> list[str]:
    """What is wrong with a folder, each as people read it, without the folder's own name."""
    with pytest.raises(ConfigError) as caught:
        load(folder, check_owner=check_owner)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def warnings(folder: Path) -> list[str]:
    return [str(problem).replace(f"{folder}/", "") for problem in load(folder).warnings]


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


def test_later_files_override_values_merge_tables_and_add_entries(write: Write) -> None:
    port = "[[port]]\nname = '{}'\nports = [1]\n"
    folder = write(
        "[daemon]\nresync = '10s'\nmark = 3\n[set.a]\nentries = ['10.0.0.1']\n" + port.format("main"),
        b="[daemon]\nmark = 1\n[set.b]\n" + port.format("b"),
        a="\n\n[daemon]\nyield_to = ['x']\nmark = 5\n[set.a]\nentries = ['10.0.0.2']\n" + port.format("a"),
    )
    config = load(folder)
    assert config.daemon == DaemonConfig(resync=10.0, yield_to=("x",), mark=1)
    assert [(s.name, s.networks, s.where.line) for s in config.sets] == [
        ("a", (IPv4Network("10.0.0.2/32"),), 4),
        ("b", (), 3),
    ]
    assert [(p.name, p.where) for p in config.ports] == [
        ("main", Where(f"{folder}/nodewalld.toml", 6, 0)),
        ("a", Where(f"{folder}/conf.d/a.toml", 8, 1)),
        ("b", Where(f"{folder}/conf.d/b.toml", 4, 2)),
    ]


def test_an_empty_list_adds_nothing_to_entries_of_other_files(write: Write) -> None:
    folder = write("[[port]]\nname = 'p'\nports = [1]", a="port = []", b="failsafe.ports = ['23/tcp']", c="[failsafe]")
    assert len(load(folder).ports) == 1


def test_a_name_taken_in_another_file_names_both_places(write: Write) -> None:
    jump = "[[jump]]\nname = '{0}'\ntable = 'nat'\nfrom = 'OUTPUT'\nto = '{0}'\n"
    folder = write(jump.format("Same"), a="\n" + jump.format("same"))
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert caught.value.problems == (
        Problem(
            Where(f"{folder}/conf.d/a.toml", 3, 1),
            "jump.same.name",
            f'"same" is already the name of {folder}/nodewalld.toml:2',
            "another name",
        ),
    )


def test_one_bad_file_does_not_hide_what_is_wrong_in_the_others(write: Write) -> None:
    folder = write("x = 1", a="a = \n", b="[[port]]\nname = 'p'\nports = [0]\nallow = ['@in-a']", c=b"\n# \xff\n")
    known = "daemon, failsafe, forward, jump, port, rule, service, set, zone"
    assert problems(folder) == [
        f"nodewalld.toml:1: x: is not a known key (known here: {known})",
        "conf.d/a.toml:1: syntax: Invalid value, at column 5 (see https://toml.io)",
        'conf.d/b.toml:3: port.p.ports[0]: 0 is out of range (a number from 1 to 65535, or "FIRST-LAST")',
        "conf.d/c.toml:2: file: is not UTF-8 here (save the file as UTF-8)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a = 1\n\nb = [1,\n", "3: syntax: "),
        (b"[daemon]\n[daemon]\n", "2: syntax: "),
        (b"\xef\xbb\xbf[daemon]\n", "1: file: begins with a byte order mark (save the file as UTF-8 without BOM)"),
        (b'a = "x\x00"', "1: syntax: Illegal character '\\x00', at column 7"),
    ],
)
def test_a_syntax_error_has_its_line(text: bytes, expected: str, write: Write) -> None:
    [found] = problems(write(text))
    assert found.startswith(f"nodewalld.toml:{expected}")


def test_a_missing_folder_or_main_file_is_told_with_a_cure(write: Write, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert problems(missing) == [f"{missing}:1: file: does not exist (create it)"]
    folder = write(None)
    shutil.rmtree(folder / "conf.d")
    assert problems(folder) == ["nodewalld.toml:1: file: does not exist (create it)"]


def test_what_is_no_file_is_told_apart(write: Write, tmp_path: Path) -> None:
    folder = write("")
    (folder / "conf.d/a.toml").mkdir(mode=0o755)
    (folder / "conf.d/b.toml").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "conf.d/c.toml", 0o600)
    (folder / "conf.d/d.toml").symlink_to("d.toml")
    (folder / "conf.d/.hidden.toml").write_text("nonsense")
    (folder / "conf.d/README").write_text("nonsense")
    assert problems(folder) == [
        "conf.d/a.toml:1: file: is a folder (a text file in its place)",
        "conf.d/b.toml:1: file: is a symbolic link to nothing (make it point to a file, or remove it)",
        "conf.d/c.toml:1: file: is not a regular file (a text file in its place)",
        "conf.d/d.toml:1: file: can't be read: Too many levels of symbolic links (see: ls -ld conf.d/d.toml)",
    ]


def test_a_file_in_the_place_of_a_folder_is_told(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert problems(file) == [f"{file}:1: file: is not a folder (a folder in its place)"]
    folder = write("")
    (folder / "conf.d").rmdir()
    (folder / "conf.d").write_text("")
    assert problems(folder) == ["conf.d:1: file: is not a folder (a folder in its place)"]


def test_symbolic_links_to_trusted_files_are_followed(write: Write, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("[daemon]\nmark = 1\n")
    target.chmod(0o600)
    folder = write("")
    (folder / "conf.d/a.toml").symlink_to(target)
    assert load(folder).daemon.mark == 1


@pytest.mark.parametrize("path", ["", "nodewalld.toml", "conf.d", "conf.d/a.toml"])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_can_write_is_refused(path: str, bits: int, write: Write) -> None:
    folder = write("", a="")
    target = folder / path
    mode = target.stat().st_mode & 0o777 | bits
    target.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{target}:1: file: can be written by others than root (mode {mode:04o}) (chmod go-w {target})"
    ]
    assert load(folder, check_owner=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_refused(write: Write) -> None:
    folder = write("")
    os.chown(folder / "nodewalld.toml", 4711, 0)
    (folder / "nodewalld.toml").chmod(0o664)
    [found] = problems(folder)
    assert found == (
        "nodewalld.toml:1: file: belongs to user 4711, who can write it and can be written by others than root "
        "(mode 0664) (chown root nodewalld.toml && chmod go-w nodewalld.toml)"
    )


def test_a_link_into_a_folder_that_others_can_write_is_refused(write: Write, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "a.toml").touch(0o600)
    loose.chmod(0o777)
    folder = write("")
    (folder / "conf.d/a.toml").symlink_to(loose / "a.toml")
    says = f"lies in {loose}, which can be written by others than root (mode 0777) (chmod go-w {loose})"
    assert problems(folder) == [f"conf.d/a.toml:1: file: {says}"]
    loose.chmod(0o1777)
    assert load(folder)


def test_a_set_files_faults_have_its_own_name_and_lines(write: Write, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("10.0.0.1\r\n# 10.0.0.300\nten # ten\n\n\t10.0.0.1/8\n@set\nany\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"10.0.0.1\n\xff\n")
    loose = tmp_path / "loose.txt"
    loose.touch()
    for path, mode in ((bad, 0o644), (binary, 0o644), (loose, 0o646)):
        path.chmod(mode)
    folder = write(f"[set.s]\nfiles = [\n '{bad}',\n '{binary}',\n '{loose}',\n '{tmp_path}']")
    address = '(such as "10.0.0.1", "10.0.0.0/8" or "fd00::/64")'
    writable = f"can be written by others than root (mode 0646) (chmod go-w {loose})"
    assert sorted(problems(folder)) == sorted(
        [
            f'{bad}:3: set.s.files[0]: "ten" is not an address or CIDR {address}',
            f'{bad}:5: set.s.files[0]: "10.0.0.1/8" has host bits set ("10.0.0.0/8" or "10.0.0.1/32")',
            f'{bad}:6: set.s.files[0]: "@set" is a set, and sets have no place here {address}',
            f'{bad}:7: set.s.files[0]: any has no place here ("0.0.0.0/0" and "::/0")',
            f"{binary}:2: set.s.files[1]: is not UTF-8 here (save the file as UTF-8)",
            f"nodewalld.toml:5: set.s.files[2]: {loose} {writable}",
            f"nodewalld.toml:6: set.s.files[3]: {tmp_path} is a folder (a text file in its place)",
        ]
    )


def test_names_that_no_terminal_should_see_are_escaped(write: Write) -> None:
    folder = write("", **{"a\n\x1b[31m": "x = 1"})
    (folder / "conf.d/a\n\x1b[31m.toml").rename(os.fsdecode(os.fsencode(folder) + b"/conf.d/a\n\x1b\xff.toml"))
    [found] = problems(folder)
    assert found.startswith(r"conf.d/a\n\x1b\\xff.toml:1: x: is not a known key")
