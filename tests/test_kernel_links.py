"""Interfaces, addresses and default routes: seen as they are, heard of when they change."""

import json
import subprocess
import sys

from kernel_ns import in_own_namespace, readable, sh, until

from nodewalld.core.words import Family
from nodewalld.kernel.links import LinkEvents, Links

V4, V6 = Family.IPV4, Family.IPV6
NONE = {V4: (), V6: ()}


def lines(text: str) -> None:
    for line in text.strip().splitlines():
        sh(line.strip())


def two_uplinks() -> None:
    """up0 and up1 with carrier, and no link-local addresses, which nobody could foretell."""
    for name in ("up0", "up1"):
        lines(f"""
            ip link add {name} type veth peer name {name}-peer
            ip link set {name} addrgenmode none
            ip link set {name}-peer addrgenmode none
            ip link set {name} up
            ip link set {name}-peer up
        """)


@in_own_namespace
def test_a_bare_namespace_has_lo_and_nothing_else() -> None:
    with Links() as links:
        state = links.snapshot()
        assert state.interfaces == ("lo",)
        assert (state.default_routes, state.addresses, state.service_addresses) == (NONE, NONE, NONE)


@in_own_namespace
def test_addresses_are_the_node_s_own_whatever_their_age() -> None:
    two_uplinks()
    lines("""
        ip address add 10.0.0.1/24 dev up0
        ip address add 10.0.0.9/24 dev up0
        ip address add 10.1.0.1 peer 10.1.0.2 dev up1
        ip -6 address add fd00::1/64 dev up0 preferred_lft 0
        ip -6 address add fd00::2/64 dev up1
        ip -6 address add fe80::5/64 dev up1
        ip link add kube-ipvs0 type bridge
        ip address add 10.96.0.1/32 dev kube-ipvs0
        ip -6 address add fd00:96::1/128 dev kube-ipvs0
    """)
    with Links() as links:
        state = links.snapshot()
        assert state.interfaces == ("kube-ipvs0", "lo", "up0", "up0-peer", "up1", "up1-peer")
        assert state.addresses == {
            V4: ("10.0.0.1", "10.0.0.9", "10.1.0.1"),
            V6: ("fd00::1", "fd00::2", "fe80::5"),
        }
        assert state.service_addresses == {V4: ("10.96.0.1",), V6: ("fd00:96::1",)}


@in_own_namespace
def test_every_way_out_that_a_default_route_names_is_found() -> None:
    two_uplinks()
    lines("""
        ip address add 10.0.0.1/24 dev up0
        ip -6 address add fd00::1/64 dev up0
        ip route add 192.0.2.0/24 dev up1
        ip route add default dev up1 table 100
        ip route add unreachable default metric 5000
        ip route add blackhole default metric 6000
        ip -6 route add unreachable default metric 5000
    """)
    with Links() as links:
        assert links.snapshot().default_routes == NONE
        sh("ip route add default via 10.0.0.2 metric 100")
        assert links.snapshot().default_routes == {V4: ("up0",), V6: ()}
        sh("ip route add default dev up1 metric 200")
        assert links.snapshot().default_routes == {V4: ("up0", "up1"), V6: ()}
        sh("ip -6 route add default via fd00::2 dev up0 proto ra expires 100")
        assert links.snapshot().default_routes[V6] == ("up0",)
        lines("""
            ip route del default metric 100
            ip route del default metric 200
            ip route add default nexthop via 10.0.0.2 dev up0 nexthop dev up1
            ip -6 route del default proto ra
            ip -6 route add default nexthop via fe80::1 dev up0 nexthop via fe80::2 dev up1
        """)
        assert links.snapshot().default_routes == {V4: ("up0", "up1"), V6: ("up0", "up1")}


@in_own_namespace
def test_equal_worlds_are_equal_values_and_a_change_shows() -> None:
    two_uplinks()
    with Links() as links:
        before = links.snapshot()
        assert links.snapshot() == before
        sh("ip address add 10.0.0.1/24 dev up0")
        assert links.snapshot() != before
        sh("ip address del 10.0.0.1/24 dev up0")
        assert links.snapshot() == before
        sh("ip link set up0 name other")
        assert links.snapshot().interfaces == ("lo", "other", "up0-peer", "up1", "up1-peer")


@in_own_namespace
def test_every_change_is_heard_and_nothing_else_is() -> None:
    two_uplinks()
    with LinkEvents() as events, Links() as links:
        assert not events.drain()
        for change in (
            # Each the business of one group alone: an address on an interface that is down has no routes.
            "ip link add name off type veth peer name off-peer",
            "ip link set off name down0",
            "ip address add 10.7.0.1/24 dev down0",
            "ip -6 address add fd07::1/64 dev down0",
            "ip link set up1 down",
            "ip link set up1 up",
            "ip address add 10.0.0.1/24 dev up0",
            "ip -6 address add fd00::1/64 dev up0 nodad",
            "ip route add default via 10.0.0.2",
            "ip -6 route add default via fd00::2 dev up0",
            "ip link del up1",
        ):
            sh(change)
            assert readable(events), change
            assert events.drain()
        until(lambda: not readable(events, limit=0.05) or not events.drain(), "quiet")
        links.snapshot()
        sh("ip link")
        sh("iptables-nft -A INPUT -p tcp")
        assert not events.drain()


@in_own_namespace
def test_interfaces_that_come_and_go_meanwhile_break_no_snapshot() -> None:
    two_uplinks()
    script = "import subprocess,sys\nfor _ in range(60):\n"
    for line in ("link add x type veth peer name y", "link set x up", "address add 10.9.0.1/24 dev x", "link del x"):
        script += f"    subprocess.run('ip {line}'.split(), check=True)\n"
    with Links() as links, subprocess.Popen([sys.executable, "-c", script]) as busy:
        count = 0
        while busy.poll() is None:
            assert {"lo", "up0", "up1"} <= set(links.snapshot().interfaces)
            count += 1
        assert count > 5
        assert busy.returncode == 0
        assert "x" not in links.snapshot().interfaces


def test_importing_the_module_does_not_import_pyroute2() -> None:
    code = "import json, sys, nodewalld.kernel.links; print(json.dumps('pyroute2' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


@in_own_namespace
def test_a_snapshot_leaves_out_what_pyroute2_brings_along() -> None:
    code = (
        "import sys; from nodewalld.kernel.links import Links; Links().snapshot(); print('pyroute2.ndb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
