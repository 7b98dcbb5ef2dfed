"""What `nodewallctl import` makes of rulesets: every line accounted for, and TOML that means what stood there."""

import io
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_table import FakeTable
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodewalld.commands import ctl
from nodewalld.configuration.load import recall
from nodewalld.core.config import Config, Sources
from nodewalld.core.decide import decide
from nodewalld.core.desired import DesiredTable
from nodewalld.core.environment import Environment
from nodewalld.core.iptables.render import render as render_desired
from nodewalld.core.observed import Learned
from nodewalld.core.plan import plan
from nodewalld.core.ruletext import Rule, join
from nodewalld.core.words import Family, Table
from nodewalld.importing.account import Account, account
from nodewalld.importing.dump import Dump, DumpError, read_dump
from nodewalld.importing.sets import KernelSet
from nodewalld.importing.writing import render, toml_string

CAPTURES = sorted(
    path
    for folder in (Path(__file__).parent / "captures", *Path(__file__).parents[2].glob("shared/captures/*"))
    for path in folder.glob("*")
    if path.suffix in {".rules", ".save"} and "\n*" in path.read_text()
)
"""The project's own, and many more where they are at hand; all are taken within a second or two."""


def loaded(toml: str) -> Config:
    return recall(Sources("/etc", {"/etc/nodewalld.toml": toml}))


def dump(*lines: str, table: str = "filter", file: str = "rules.v4", family: Family | None = Family.IPV4) -> Dump:
    return read_dump("\n".join([f"*{table}", *lines, "COMMIT", ""]).encode(), file, family)


def entries(*lines: str, table: str = "filter") -> list[tuple[str, str, object]]:
    """Chain, text and position of what is carried over."""
    made = [entry.toml() for entry in account([dump(*lines, table=table)]).entries]
    return [(str(keys["chain"]), str(keys["rule"]), keys.get("position", "early")) for keys in made]


def reasons(*lines: str, table: str = "filter") -> list[str]:
    return [f"{line.number}: {why}" for line, why in account([dump(*lines, table=table)]).impossible]


def test_every_line_of_every_capture_is_accounted_for_once_and_the_toml_loads() -> None:
    assert len(CAPTURES) > 25
    for path in CAPTURES:
        read = read_dump(path.read_bytes(), path.name)
        found = account([read])
        accounted = [*found.carried, *(line for line, _ in found.foreign), *(line for line, _ in found.impossible)]
        assert Counter(accounted) == Counter(read.lines()), path.name
        config = loaded(render(found, path.name))
        assert [rule.name for rule in config.rules] == [entry.name for entry in found.entries]
        assert [rule.text for rule in config.rules] == [entry.text for entry in found.entries]


# What people wrote on top of the neighbours' rules is all that is carried over from these.
HAND_MADE = {
    "kp126-nft-3svc.v4.save": [],
    "kp126+felix3264-insert-nft-3svc.v4.save": [],
    "felix3264-insert-hep-nft.v6.save": [],
    "docker-20.10-nft-container-published.v4.rules": [],
    "docker-20.10-nft-ip6tables-container-published.v6.rules": [],
    "firewalld-1.3.3-fbiptables-nft-after-start.v4.rules": [],
    "docker-20.10-nft-foreign-before-restart.v4.rules": [
        "foreign:mangle-pre",
        "foreign:end",
        "foreign:docker-user-top",
        "foreign:docker-user-after-return",
        "foreign:nat-pre-top",
        "foreign:nat-pre-end",
        "foreign:nat-post-top",
    ],
    "cni-plugins-1.1.1-nft-two-pods.v4.rules": ["nodewall:nat-pre", "nodewall:nat-post"],
    "ufw-0.36.2-nft-after-allow.v4.rules": [],
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_the_neighbours_keep_their_rules_and_people_get_theirs(name: str, captures: Path) -> None:
    found = account([read_dump((captures / name).read_bytes(), name)])
    comments = [comment for entry in found.entries for comment in Rule(entry.text).comments]
    assert comments == HAND_MADE[name], [entry.text for entry in found.entries]
    assert len(comments) == len(found.entries)


OWNERS = [
    ("filter", "FORWARD", "-j KUBE-ROUTER-FORWARD", "kube-router"),
    ("filter", "FORWARD", '-m comment --comment "cali:x" -m mark --mark 0x1/0x1 -j ACCEPT', "Calico"),
    ("filter", "FORWARD", "-i br-0123456789ab -o br-0123456789ab -j DROP", "Docker"),
    ("filter", "FORWARD", "-i eth0 ! -o eth0 -j ACCEPT", ""),
    ("filter", "INPUT", "-i virbr0 -p udp -m udp --dport 53 -j ACCEPT", "libvirt"),
    ("filter", "INPUT", "-i virbr0 -p udp -m udp --dport 54 -j ACCEPT", ""),
    ("filter", "INPUT", '-i lxdbr0 -p tcp -m comment --comment "generated for LXD network lxdbr0" -j ACCEPT', "LXD"),
    ("filter", "INPUT", "-j ts-input", "Tailscale"),
    ("filter", "INPUT", "-p tcp -j f2b-sshd", "fail2ban"),
    ("filter", "FORWARD", "-j NETAVARK_FORWARD", "podman"),
    ("filter", "FORWARD", "-j LIBVIRT_FWX", "libvirt"),
    ("filter", "FORWARD", '-m comment --comment "nodewalld:at/early" -j DROP', "nodewalld"),
    ("filter", "INPUT", "-m conntrack --ctstate INVALID -j DROP", ""),
    ("nat", "POSTROUTING", "-s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE", ""),
    ("nat", "POSTROUTING", "-s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN", ""),
]


@pytest.mark.parametrize(("table", "chain", "text", "owner"), OWNERS, ids=[o[2][:40] for o in OWNERS])
def test_a_rule_is_a_neighbours_only_by_its_target_comment_or_very_shape(
    table: str, chain: str, text: str, owner: str
) -> None:
    found = account([dump(f"-A {chain} {text}", table=table)])
    assert [owner for _, owner in found.foreign] == ([owner] if owner else [])


def test_what_only_a_present_neighbour_writes_is_its_own_beside_its_chains() -> None:
    masquerade = "-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE"
    assert entries(":DOCKER - [0:0]", masquerade, table="nat") == []
    invalid = "-A INPUT -m conntrack --ctstate INVALID -j DROP"
    assert entries(":INPUT_direct - [0:0]", invalid) == []
    flannel = "-A POSTROUTING -s 10.42.0.0/16 -d 10.42.0.0/16 -j RETURN"
    assert entries(flannel, table="nat") != []
    assert entries(flannel, "-A POSTROUTING -s 10.42.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE", table="nat") == []


CALI, KUBE, USER = "-j cali-FORWARD", "-j KUBE-FORWARD", "-j DOCKER-USER"
MARK = '-m comment --comment "cali:y" -m mark --mark 0x1/0x1 -j ACCEPT'
X = "-s 192.0.2.1/32 -j DROP"


@pytest.mark.parametrize(
    ("order", "position"),
    [
        ([X], "early"),
        (["-j NODEWALL-FORWARD", X], "early"),
        ([X, KUBE, USER], "early"),
        ([CALI, X, KUBE], "early"),
        ([CALI, X], "early"),
        ([KUBE, X], "last"),
        ([CALI, KUBE, X, USER], {"after": ["KUBE-FORWARD"], "before": ["DOCKER-USER"]}),
        (
            [CALI, KUBE, X, MARK],
            {"after": ["KUBE-FORWARD"], "before": [{"rule": "-m mark --mark 0x1/0x1 -j ACCEPT"}]},
        ),
        ([KUBE, USER, X, KUBE], {"after": ["DOCKER-USER"]}),
    ],
)
def test_the_position_is_the_one_that_leads_back_to_the_place(order: list[str], position: object) -> None:
    assert [(text, place) for _, text, place in entries(*(f"-A FORWARD {text}" for text in order))] == [(X, position)]


def test_a_rule_above_calico_is_let_below_it_and_that_is_said() -> None:
    found = account([dump(f"-A FORWARD {X}", f"-A FORWARD {CALI}")])
    [entry] = found.entries
    assert "position" not in entry.toml()
    assert entry.note == 'stood above cali-FORWARD, whose owner insists on the top: "first" would be a war'
    assert f"# NOTE: {entry.note}" in render(found, "x")


def test_what_stands_in_docker_user_is_carried_over_into_it_but_dockers_own_return() -> None:
    lines = (
        ":DOCKER-USER - [0:0]",
        "-A DOCKER-USER -s 10.0.0.0/8 -j RETURN",
        f"-A DOCKER-USER {X}",
        "-A DOCKER-USER -j RETURN",
    )
    assert entries(*lines) == [
        ("DOCKER-USER", "-s 10.0.0.0/8 -j RETURN", "early"),
        ("DOCKER-USER", X, "early"),
    ]


# Hand-made chains. The jump is line 2 of the dump, or the chain's rules follow from line 3.
def chained(jump: str, *rules: str) -> list[str]:
    return [text for _, text, _ in entries(f"-A INPUT {jump}", ":MINE - [0:0]", *(f"-A MINE {r}" for r in rules))]


def refused(jump: str, *rules: str) -> str:
    return reasons(f"-A INPUT {jump}", ":MINE - [0:0]", *(f"-A MINE {r}" for r in rules))[0].split(": ", 1)[1]


def test_a_hand_made_chain_is_resolved_where_the_meaning_stays_the_same() -> None:
    assert chained("-j MINE", "-s 192.0.2.1/32 -j ACCEPT", "-j DROP") == ["-s 192.0.2.1/32 -j ACCEPT", "-j DROP"]
    assert chained("-p tcp -m tcp --dport 22 -j MINE", "-s 192.0.2.1/32 -p tcp -j ACCEPT", "-j DROP", "-j RETURN") == [
        "-s 192.0.2.1/32 -p tcp -m tcp --dport 22 -j ACCEPT",
        "-p tcp -m tcp --dport 22 -j DROP",
    ]
    assert chained("-m limit --limit 1/sec -j MINE", "-j LOG") == ["-m limit --limit 1/sec -j LOG"]
    assert chained("! -i lo -j MINE", "-j MARK --set-xmark 0x1/0x1") == ["! -i lo -j MARK --set-xmark 0x1/0x1"]


def test_a_hand_made_chain_is_refused_where_it_would_mean_something_else() -> None:
    assert "is left early" in refused("-j MINE", "-s 192.0.2.1/32 -j RETURN", "-j DROP")
    assert "is left early" in refused("-j MINE", "-s 192.0.2.1/32 -g MINE", "-j DROP")
    assert "without coming back" in refused("-g MINE", "-j DROP")
    assert "counts how often" in refused("-m limit --limit 1/sec -j MINE", "-j LOG", "-j DROP")
    assert "may change what" in refused("-m mark --mark 0x1 -j MINE", "-j MARK --set-xmark 0x0/0x1", "-j DROP")
    assert "-s stands both" in refused("-s 10.0.0.0/8 -j MINE", "-s 10.1.0.0/16 -j DROP")
    assert "leads back to itself" in refused("-j MINE", "-j MINE")
    assert "does nothing" in refused("-j MINE")
    assert "more than 200 rules" in refused("-j MINE", *["-j LOG"] * 201)
    assert reasons(":LOST - [0:0]", "-A LOST -j DROP") == [
        "3: nothing that is carried over leads to the hand-made chain LOST"
    ]


def test_policies_and_commands_are_told_with_their_lines() -> None:
    assert reasons(":INPUT DROP [0:0]", "-I INPUT 1 -j DROP") == [
        "2: the policy DROP can't be carried over; a [zone.NAME] can say the same",
        "3: only -A can be carried over",
    ]
    [why] = reasons(":FORWARD DROP [0:0]", "-A FORWARD -j DOCKER-USER")
    assert why == "2: the policy DROP can't be carried over; it may be Docker's own"


def test_what_nodewalld_refuses_is_told_in_its_own_words() -> None:
    assert reasons('-A INPUT -m comment --comment "x', "-A INPUT -j NODEWALLER") == [
        '2: a double quote (") is opened and never closed',
        '3: jumps to "NODEWALLER", a name that nodewalld keeps for itself',
    ]
    bytes_that_are_no_text = b'*filter\n-A INPUT -m comment --comment "caf\xe9" -j DROP\nCOMMIT\n'
    assert account([read_dump(bytes_that_are_no_text, "x")]).entries == ()


def both(v4: Sequence[str], v6: Sequence[str], sets: dict[str, KernelSet] | None = None) -> Account:
    families = ((v4, Family.IPV4), (v6, Family.IPV6))
    return account([dump(*(f"-A {line}" for line in lines), family=f) for lines, f in families], sets)


def test_what_both_families_have_alike_is_written_once_and_keeps_both_orders() -> None:
    found = both(
        ["INPUT -i lo -j ACCEPT", "INPUT -s 192.0.2.1/32 -j DROP", "INPUT -p tcp -j DROP"],
        ["INPUT -p ipv6-icmp -j ACCEPT", "INPUT -i lo -j ACCEPT", "INPUT -p tcp -j DROP"],
    )
    assert [(entry.text, "".join(str(f.version) for f in entry.families)) for entry in found.entries] == [
        ("-p ipv6-icmp -j ACCEPT", "6"),
        ("-i lo -j ACCEPT", "46"),
        ("-s 192.0.2.1/32 -j DROP", "4"),
        ("-p tcp -j DROP", "46"),
    ]
    assert len(loaded(render(found, "x")).rules) == 4


def test_sets_are_taken_over_copied_or_told() -> None:
    match = "INPUT -m set --match-set {} src -j DROP"
    kernel = {
        "nets": KernelSet("hash:net", Family.IPV4, ("10.0.0.0/8",)),
        "nets-v6": KernelSet("hash:net", Family.IPV6, ("fd00::/8",)),
        "hosts": KernelSet("hash:ip", Family.IPV4, ("192.0.2.1",)),
        "pairs": KernelSet("hash:ip,port", Family.IPV4),
    }
    v4 = [match.format(name) for name in ("nets", "hosts", "pairs", "gone", "KUBE-X")]
    found = both(v4, [match.format("nets-v6")], kernel)
    assert {name: list(entries) for name, entries in found.sets.items()} == {
        "nets": ["10.0.0.0/8", "fd00::/8"],
        "hosts_nw": ["192.0.2.1"],
    }
    assert [entry.text.split()[3] for entry in found.entries] == ["nets", "hosts_nw", "pairs", "gone", "KUBE-X"]
    assert [len(entry.families) for entry in found.entries] == [2, 1, 1, 1, 1]
    assert [remark.split()[1].rstrip(":") for remark in found.remarks] == ["hosts", "pairs", "gone", "KUBE-X"]
    assert {entry.name for entry in loaded(render(found, "x")).sets} == {"nets", "hosts_nw"}
    assert "must be defined" in both([match.format("nets")], []).remarks[0]


@given(st.text())
@example("\x7f")
@example("'\"\\\U0001f600\u2028\0")
def test_any_text_is_the_same_after_toml(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    assert tomllib.loads(f"x = {toml_string(text)}")["x"] == text


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_any_rule_text_goes_through_import_and_toml_unharmed(words: list[str]) -> None:
    text = join([part for word in words for part in ("-m", "string", "--string", word)] + ["-j", "DROP"])
    found = account([dump(f"-A INPUT {text}", f'-A INPUT -m comment --comment "{words[0]}" -j LOG')])
    config = loaded(render(found, "rules.v4"))
    assert [Rule(rule.text).words for rule in config.rules][:1] == [Rule(text).words]
    assert len(config.rules) + len(found.impossible) == 2


FOREIGN = [CALI, KUBE, USER, "-j KUBE-SERVICES", MARK, "-o docker0 -j DOCKER", "-i docker0 -o docker0 -j ACCEPT"]


@given(
    st.lists(st.sampled_from(FOREIGN), max_size=8),
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["DROP", "RETURN", "ACCEPT"])), min_size=1, max_size=6),
)
@settings(max_examples=200)
def test_enforcing_what_was_imported_gives_the_dumps_order_again(
    foreign: list[str], own: list[tuple[int, str]]
) -> None:
    order = list(foreign)
    mine = [f"-s 192.0.2.{number}/32 -j {verdict}" for number, (_, verdict) in enumerate(own, 1)]
    for text, (slot, _) in zip(mine, own, strict=True):
        order.insert(min(slot, len(order)), text)
    found = account([dump(*(f"-A FORWARD {text}" for text in order))])
    told = {line.rule.text for entry in found.entries if entry.note for line in entry.lines if line.rule}
    table = FakeTable(Table.FILTER, {"FORWARD": foreign})
    wanted = desired(loaded(render(found, "x")))
    planned = plan(Family.IPV4, Table.FILTER, wanted, table.observed(), Learned(), ("cali-*",))
    if planned.commands:
        table.commit(planned.script)
    assert [t for t in flat(table) if t not in told] == [t for t in order if t not in told]


def desired(config: Config) -> DesiredTable:
    return render_desired(decide(config, Family.IPV4, Environment({}, {}, {}))).tables[Table.FILTER]


def flat(table: FakeTable) -> list[str]:
    """FORWARD with our jumps resolved and our tags taken away."""
    found = []
    for text in table.chains["FORWARD"]:
        rule = Rule(text)
        inner = table.chains[rule.target] if rule.target.startswith("NODEWALL-") else [text]
        found += [join(Rule(each).bare) if Rule(each).tag else each for each in inner]
    return found


BAD = {
    b"": "is empty",
    b"\n \n": "is empty",
    b"\x7fELF\0\0": "is not text",
    b"*filter\n-A INPUT -j DROP\n": "is cut short: table filter has no COMMIT",
    b"*filter\n*nat\nCOMMIT\n": "is cut short: table filter has no COMMIT",
    b"table ip filter {\n\tchain INPUT {\n\t}\n}\n": "looks like `nft list ruleset`",
    b'{"nftables": []}': "looks like `nft -j list ruleset`",
    b"Chain INPUT (policy ACCEPT)\ntarget prot opt source destination\n": "looks like `iptables -L`",
    b"-P INPUT ACCEPT\n-A INPUT -j DROP\n": "looks like `iptables -S`",
    b"create hosts hash:net family inet\n": "looks like `ipset save`",
    b"[[rule]]\nname = 'x'\n": "looks like a TOML file",
    b"Dear all,\n": "is not what iptables-save prints",
    b"*broute\nCOMMIT\n": '"broute", which iptables does not have',
    b"*filter\nhello\nCOMMIT\n": '"hello" is not a line',
    b"*filter\nCOMMIT\nhello\n": '"hello" stands in no table',
    b"x" * (10 << 20): "is not what iptables-save prints",
    b"*filter\n" + b"x" * (10 << 20): "is not a line",
}


@pytest.mark.parametrize("content", BAD, ids=lambda c: repr(c[:24]))
def test_what_is_no_dump_is_refused_with_what_it_looks_like_and_the_cure(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rules"
    path.write_bytes(content)
    assert ctl.main(["import", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert BAD[content] in err
    assert err.startswith(f"nodewallctl: {path}")
    assert "iptables-save > FILE" in err
    assert len(err) < 1000


@given(st.binary(max_size=300) | st.lists(st.sampled_from(b'*:-A []"\n'), max_size=60).map(bytes))
def test_no_bytes_at_all_bring_it_down(content: bytes) -> None:
    try:
        found = account([read_dump(b"*filter\n" + content + b"\nCOMMIT\n", "x")])
    except DumpError:
        return
    loaded(render(found, "x"))


def test_the_command_prints_toml_and_tells_the_rest_line_by_line(
    captures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = captures / "docker-20.10-nft-foreign-before-restart.v4.rules"
    assert ctl.main(["import", str(path)]) == 0
    out, err = capsys.readouterr()
    assert len(loaded(out).rules) == 7
    assert f"{path}:27: it leads to a hand-made chain that does nothing: -A FORWARD" in err
    assert "lines left to the programs that write them: Docker 3" in err

    content = path.read_bytes().replace(b"\n-A", b"\n[12:345] -A")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert ctl.main(["import", "--json", "-"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [rule.text for rule in loaded(value["toml"]).rules] == [rule.text for rule in loaded(out).rules]
    assert {key: len(value[key]) for key in ("carried", "foreign", "impossible")} == {
        "carried": 7,
        "foreign": 34,
        "impossible": 3,
    }
    assert value["carried"][0] == {
        "file": "standard input",
        "line": 9,
        "table": "mangle",
        "text": '-A PREROUTING -s 198.51.100.15/32 -m comment --comment "foreign:mangle-pre" -j DROP',
        "rules": ["foreign-mangle-pre"],
    }


def test_what_is_not_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        assert ctl.main(["import", str(path)]) == 1
        assert words in capsys.readouterr().err
