"""The legacy tables, looked at: a look changes nothing, and tells a moved rule from a counted packet."""

import re

import pytest
from captured import CAPTURES
from kernel_ns import argv, in_own_namespace, send_packets, sh
from test_kernel_nftables import MATCHES, TARGETS

from nodewalld.core.words import Family
from nodewalld.kernel.xtables import LegacyReader

FAMILIES = pytest.mark.parametrize("family", list(Family))


def legacy(family: Family) -> str:
    return f"{family.tool}-legacy"


@FAMILIES
@in_own_namespace
def test_looking_creates_no_table(family: Family) -> None:
    with LegacyReader(family) as reader:
        assert reader.tables() == frozenset()
        assert reader.fingerprint("filter") is None
        assert reader.size("filter") == 0
        assert not reader.has_chain("filter", "SOME")
        assert reader.tables() == frozenset()
        sh(f"{legacy(family)} -t mangle -N SOME")
        assert reader.tables() == {"mangle"}
        assert reader.fingerprint("filter") is None
        assert reader.tables() == {"mangle"}


def stand(tool: str, family: Family) -> None:
    """A rule for each kind of target in mangle, and for each kind of match in filter."""
    argv(["ipset", "create", "seen", "hash:ip", "family", "inet" if family is Family.IPV4 else "inet6"])
    for target in TARGETS:
        sh(f"{tool} -t mangle -A INPUT -j " + target.format(set="seen"))
    for match in MATCHES:
        sh(f"{tool} -A INPUT " + match.format(set="seen"))


@FAMILIES
@in_own_namespace
def test_no_packet_moves_a_fingerprint(family: Family) -> None:
    tool = legacy(family)
    stand(tool, family)
    with LegacyReader(family) as reader:
        before = [reader.fingerprint(table) for table in ("filter", "mangle")]
        counters = argv([f"{tool}-save", "-c"])
        for _ in range(2):
            send_packets(50, "127.0.0.1" if family is Family.IPV4 else "::1")
            assert [reader.fingerprint(table) for table in ("filter", "mangle")] == before
        assert argv([f"{tool}-save", "-c"]) != counters
        assert None not in before


@FAMILIES
@in_own_namespace
def test_a_moved_rule_shows_though_all_sizes_stay(family: Family) -> None:
    tool = legacy(family)
    for rule in ("-m mark --mark 1", "-m mark --mark 2"):
        sh(f"{tool} -A INPUT {rule}")
    with LegacyReader(family) as reader:
        before, size = reader.fingerprint("filter"), reader.size("filter")
        argv([f"{tool}-restore", "--noflush"], stdin="*filter\n-D INPUT 1\n-A INPUT -m mark --mark 1\nCOMMIT\n")
        assert reader.size("filter") == size
        assert reader.fingerprint("filter") != before
        argv([f"{tool}-restore", "--noflush"], stdin="*filter\n-D INPUT 1\n-A INPUT -m mark --mark 2\nCOMMIT\n")
        assert reader.fingerprint("filter") == before


@FAMILIES
@in_own_namespace
def test_policies_comments_and_jumps_are_part_of_a_fingerprint(family: Family) -> None:
    tool = legacy(family)
    sh(f"{tool} -N SOME")
    sh(f"{tool} -N OTHER")
    sh(f"{tool} -A INPUT -j SOME")
    with LegacyReader(family) as reader:
        seen = {reader.fingerprint("filter")}
        for count, change in enumerate(
            ("-R INPUT 1 -j OTHER", "-R INPUT 1 -g OTHER", "-P FORWARD DROP", "-A OTHER -m comment --comment a"), 2
        ):
            sh(f"{tool} {change}")
            seen.add(reader.fingerprint("filter"))
            assert len(seen) == count
        sh(f"{tool} -R OTHER 1 -m comment --comment b")
        assert reader.fingerprint("filter") not in seen


@FAMILIES
@in_own_namespace
def test_the_user_s_chains_are_found_by_name_and_nothing_else_is(family: Family) -> None:
    tool = legacy(family)
    sh(f"{tool} -N MINE")
    sh(f"{tool} -N A-NAME-OF-TWENTY-EIGHT-CHARS")
    argv([tool, "-A", "INPUT", "-m", "comment", "--comment", "ERROR FAKE"])
    with LegacyReader(family) as reader:
        assert set(reader.chains("filter")) == {"MINE", "A-NAME-OF-TWENTY-EIGHT-CHARS"}
        assert reader.has_chain("filter", "MINE")
        for name in ("INPUT", "FAKE", "ERROR", "MIN"):
            assert not reader.has_chain("filter", name)
        sh(f"{tool} -X MINE")
        assert not reader.has_chain("filter", "MINE")


@in_own_namespace
def test_the_families_are_two_worlds() -> None:
    sh("ip6tables-legacy -A INPUT -p tcp")
    with LegacyReader(Family.IPV4) as four, LegacyReader(Family.IPV6) as six:
        assert four.tables() == frozenset()
        assert six.tables() == {"filter"}


CHANGES = (
    "-N FIRST-OF-ALL",
    "-I INPUT -j FIRST-OF-ALL",
    "-A FIRST-OF-ALL -m comment --comment only-counts",
    "-I OUTPUT -g FIRST-OF-ALL",
    "-P FORWARD DROP",
)


def texts(family: Family, table: str) -> dict[str, list[str]]:
    """The rules of a table as the tool prints them, by chain."""
    found: dict[str, list[str]] = {}
    for line in argv([f"{legacy(family)}-save", "-t", table]).splitlines():
        if line.startswith(":"):
            found[line[1:].split(" ")[0]] = []
        elif line.startswith("-A "):
            _, chain, text = line.split(" ", 2)
            found[chain].append(text)
    return found


class Dictionary:
    """What digests mean; a digest never means two texts, nor a text two digests."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, bytes], str] = {}
        self.digests: dict[tuple[str, str], bytes] = {}

    def compare(self, reader: LegacyReader, family: Family) -> int:
        """Read all tables both ways; the number of rules."""
        count = 0
        for table in sorted(reader.tables()):
            said, read = reader.rules(table) or {}, texts(family, table)
            assert {name: len(rules) for name, rules in said.items()} == {n: len(r) for n, r in read.items()}
            for chain, rules in said.items():
                for digest, text in zip(rules, read[chain], strict=True):
                    assert self.texts.setdefault((table, digest), text) == text
                    assert self.digests.setdefault((table, text), digest) == digest
                    count += 1
        return count


@FAMILIES
@in_own_namespace
def test_a_rule_s_bytes_tell_its_text(family: Family) -> None:
    """In real rulesets, wherever a chain stands and whatever packets did."""
    suffix = ".v4." if family is Family.IPV4 else ".v6."
    captured = [path for path in sorted(CAPTURES.iterdir()) if "legacy" in path.name and suffix in path.name]
    assert len(captured) >= 5
    known, tool = Dictionary(), legacy(family)
    with LegacyReader(family) as reader:
        for path in captured:
            sets = re.findall(r"--match-set (\S+) (\S+)", path.read_text())
            for name, directions in sets:
                kind = "hash:net" + ",net" * directions.count(",")
                inet = "inet" if family is Family.IPV4 else "inet6"
                argv(["ipset", "create", "-exist", name, kind, "family", inet])
            argv([f"{tool}-restore"], stdin=path.read_text())
            first = known.compare(reader, family)
            for command in CHANGES:
                sh(f"{tool} {command}")
            send_packets(5, "127.0.0.1" if family is Family.IPV4 else "::1")
            assert known.compare(reader, family) == first + 3, path.name
            sh(f"{tool} -F")
            sh(f"{tool} -X")
            sh("ipset destroy", check=False)


@FAMILIES
@in_own_namespace
def test_matches_and_targets_of_every_kind_have_bytes_of_their_own(family: Family) -> None:
    tool, known = legacy(family), Dictionary()
    stand(tool, family)
    with LegacyReader(family) as reader:
        for _ in range(3):
            assert known.compare(reader, family) == len(MATCHES) + len(TARGETS)
            send_packets(50, "127.0.0.1" if family is Family.IPV4 else "::1")
        assert len(known.digests) == len(MATCHES) + len(TARGETS)


@FAMILIES
@in_own_namespace
def test_a_set_that_is_made_anew_is_not_taken_for_the_one_before(family: Family) -> None:
    tool, known = legacy(family), Dictionary()
    inet = "inet" if family is Family.IPV4 else "inet6"
    with LegacyReader(family) as reader:
        for name in ("one", "two"):  # the second gets the number of the first
            argv(["ipset", "create", name, "hash:net", "family", inet])
            sh(f"{tool} -A INPUT -m set --match-set {name} src -m comment --comment a -j DROP")
            sh(f"{tool} -A INPUT -j SET --add-set {name} src")
            assert known.compare(reader, family) == 2
            sh(f"{tool} -F INPUT")
            sh(f"ipset destroy {name}")
        assert len(known.digests) == 4
