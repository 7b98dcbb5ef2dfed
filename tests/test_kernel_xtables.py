"""The legacy tables, looked at: a look changes nothing, and tells a moved rule from a counted packet."""

import pytest
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


@FAMILIES
@in_own_namespace
def test_no_packet_moves_a_fingerprint(family: Family) -> None:
    tool = legacy(family)
    argv(["ipset", "create", "seen", "hash:ip", "family", "inet" if family is Family.IPV4 else "inet6"])
    for target in TARGETS:
        sh(f"{tool} -t mangle -A INPUT -j " + target.format(set="seen"))
    for match in MATCHES:
        sh(f"{tool} -A INPUT " + match.format(set="seen"))
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
