"""Tracked connections: listed with what was asked and who answers, ended one by one."""

import dataclasses
import socket
import struct
from ipaddress import ip_address

from kernel_ns import in_own_namespace, send_packets, sh

from nodewalld.core.words import Family
from nodewalld.kernel.conntrack import Conntrack

V4, V6 = Family.IPV4, Family.IPV6
LOCAL = {V4: ip_address("127.0.0.1"), V6: ip_address("::1")}


def track(family: Family) -> None:
    """Tracking is off in a namespace until a rule wants it."""
    sh(f"{family.tool}-nft -A INPUT -m conntrack --ctstate NEW")
    sh(f"{family.tool}-nft -t mangle -A OUTPUT -p udp -j CONNMARK --set-mark 7")


@in_own_namespace
def test_a_flow_is_listed_with_both_its_ends_and_its_mark() -> None:
    with Conntrack() as conntrack:
        for family, address in LOCAL.items():
            assert list(conntrack.flows(family)) == []
            track(family)
            send_packets(3, str(address))
            (flow,) = conntrack.flows(family)
            assert (flow.family, flow.protocol, flow.port, flow.reply_port, flow.mark) == (family, 17, 9999, 9999, 7)
            assert (flow.source, flow.destination, flow.reply_source) == (address, address, address)


@in_own_namespace
def test_a_redirected_flow_tells_who_was_asked_and_who_answers() -> None:
    sh("iptables-nft -t nat -A OUTPUT -p udp -d 127.0.0.2 --dport 53 -j DNAT --to 127.0.0.3:9999")
    with Conntrack() as conntrack, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.2", 53))
        (flow,) = conntrack.flows(V4)
        assert (str(flow.destination), flow.port) == ("127.0.0.2", 53)
        assert (str(flow.reply_source), flow.reply_port) == ("127.0.0.3", 9999)


@in_own_namespace
def test_a_protocol_without_ports_has_port_zero() -> None:
    track(V4)
    with Conntrack() as conntrack:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sender:
            sender.sendto(b"\x08\x00\xf7\xff\x00\x00\x00\x00", ("127.0.0.1", 0))  # echo request
        (flow,) = conntrack.flows(V4)
        assert (flow.protocol, flow.port, flow.reply_port) == (1, 0, 0)
        assert conntrack.delete(flow)


@in_own_namespace
def test_exactly_the_given_flow_is_ended_and_only_once() -> None:
    with Conntrack() as conntrack:
        for family, address in LOCAL.items():
            track(family)
            send_packets(1, str(address), 1001)
            send_packets(1, str(address), 1002)
            flows = {flow.port: flow for flow in conntrack.flows(family)}
            assert conntrack.delete(flows[1001]) is True
            assert conntrack.delete(flows[1001]) is False
            assert [flow.port for flow in conntrack.flows(family)] == [1002]


@in_own_namespace
def test_another_flow_between_the_same_ends_is_not_hit() -> None:
    track(V4)
    with Conntrack() as conntrack:
        send_packets(1, port=1001)
        (flow,) = conntrack.flows(V4)
        at = flow.identity.index(struct.pack("=HH", 8, 12)) + 4  # CTA_ID
        number = bytes(byte ^ 1 for byte in flow.identity[at : at + 4])
        former = dataclasses.replace(flow, identity=flow.identity[:at] + number + flow.identity[at + 4 :])
        assert conntrack.delete(former) is False
        assert list(conntrack.flows(V4)) == [flow]


@in_own_namespace
def test_flows_may_be_ended_while_they_are_listed_and_a_listing_abandoned() -> None:
    track(V4)
    with Conntrack() as conntrack, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(3000):
            sender.sendto(b"x", (f"127.1.{number // 250}.{number % 250 + 1}", 1001))
        listing = conntrack.flows(V4)
        next(listing)
        listing.close()
        assert sum(conntrack.delete(flow) for flow in conntrack.flows(V4)) == 3000
        assert list(conntrack.flows(V4)) == []
