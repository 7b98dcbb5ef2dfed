"""What a lint says is so: packets do what the warning tells, and what was meant once it is cured."""

import json
from collections.abc import Iterator
from typing import NamedTuple, cast

import pytest
from captured import CAPTURES
from packets import OPEN, TIMEOUT, Guarded, both, dial, expect

from lab.layout import ALLOWED, BEYOND, CLUSTER_NODE, FAMILIES, NODE, STRANGER, Address
from lab.node import BackendName, Node
from lab.traffic import Verdict, serve_cluster
from nodewalld.core.lints import NOTES

pytestmark = pytest.mark.kernel


class Case(NamedTuple):
    """A configuration with the code said of it, and one that is cured; who dials what, and what each family sees."""

    code: str
    bad: str
    good: str
    dials: tuple[Address, Address, int]
    seen: dict[str, Verdict]
    meant: Verdict


def same(verdict: Verdict) -> dict[str, Verdict]:
    return dict.fromkeys(FAMILIES, verdict)


def refuse(port: int, chain: str, table: str = "filter", but: str = "") -> str:
    rule = f"{but} -p tcp --dport {port} -j DROP".strip()
    return f'[[rule]]\nname = "r"\ntable = "{table}"\nchain = "{chain}"\nrule = "{rule}"\n'


def guard(name: str, port: int, *allow: Address) -> str:
    return f'[[port]]\nname = "{name}"\nports = [{port}]\nallow = {both(*allow)}\n'


ANYBODY = '[[port]]\nname = "kubelet"\nports = [10250]\nallow = ["any"]\n'
PUBLIC = '[zone.public]\ninterfaces = ["eth0"]\nservices = ["ssh"]\ntarget = "drop"\n'
OFFICE = f'[[forward]]\nname = "office"\nout = "eth1"\nsource = {both(ALLOWED)}\naction = "accept"\n'
NOBODY = '[[forward]]\nname = "nobody"\nout = "eth1"\naction = "drop"\n'
BUT_OFFICE = '[[forward]]\nname = "nobody"\nout = "eth1"\nsource = ["!{}", "!{}"]\naction = "drop"\n'

CASES = [
    Case(
        "input-after-dnat",
        refuse(31002, "INPUT"),
        '[[port]]\nname = "p"\nports = [31002]\n',
        (STRANGER, NODE, 31002),
        same(OPEN),
        TIMEOUT,
    ),
    Case(
        "never-matches",
        OFFICE + NOBODY,
        BUT_OFFICE.format(ALLOWED.ipv4, ALLOWED.ipv6),
        (ALLOWED, BEYOND, 443),
        same(TIMEOUT),
        OPEN,
    ),
    Case(
        "allow-in-vain",
        guard("a", 2379, ALLOWED) + guard("b", 2379, CLUSTER_NODE),
        guard("a", 2379, ALLOWED, CLUSTER_NODE),
        (ALLOWED, NODE, 2379),
        same(TIMEOUT),
        OPEN,
    ),
    Case(
        "allow-in-vain",
        ANYBODY + PUBLIC,
        ANYBODY + PUBLIC + 'ports = ["10250/tcp"]\n',
        (STRANGER, NODE, 10250),
        same(TIMEOUT),
        OPEN,
    ),
    Case(
        "ipv4-only",
        refuse(2380, "PREROUTING", "mangle", f"! -s {ALLOWED.ipv4}"),
        guard("etcd", 2380, ALLOWED),
        (STRANGER, NODE, 2380),
        {"ipv4": TIMEOUT, "ipv6": OPEN},
        TIMEOUT,
    ),
    Case("failsafe-overruled", refuse(22, "INPUT"), guard("ssh", 22), (STRANGER, NODE, 22), same(TIMEOUT), OPEN),
]


@pytest.fixture(scope="module", params=["nft", "legacy"])
def guarded(request: pytest.FixtureRequest, laboratory: None) -> Iterator[Guarded]:
    with Node(cast("BackendName", request.param)) as node:
        node.load(CAPTURES / "kp126-{backend}-3svc")
        serve_cluster(node)
        yield Guarded(node)


def said(guarded: Guarded) -> set[str]:
    return {one["code"] for one in json.loads(guarded.daemon.ctl("check", "--json").stdout)["warnings"]} - NOTES


@pytest.mark.parametrize("case", CASES, ids=[f"{case.code}-{number}" for number, case in enumerate(CASES)])
def test_packets_do_what_the_warning_tells_and_what_was_meant_once_it_is_cured(guarded: Guarded, case: Case) -> None:
    source, target, port = case.dials
    probes = {family: dial(source, family, target, port) for family in FAMILIES}
    guarded.enforce(case.bad)
    assert said(guarded) == {case.code}
    expect(guarded.node, {family: (probe, case.seen[family]) for family, probe in probes.items()})
    guarded.enforce(case.good)
    expect(guarded.node, {family: (probe, case.meant) for family, probe in probes.items()})
