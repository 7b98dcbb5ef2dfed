"""Ports of many entries, sorted so that one look into a map finds all that judge a packet."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from nodewalld.core.config import PortRange
from nodewalld.core.decide import Judgement

T = TypeVar("T")


def by_protocol(judgements: Iterable[Judgement]) -> dict[str, list[tuple[PortRange, Judgement]]]:
    """What they judge, by the protocol."""
    spans: dict[str, list[tuple[PortRange, Judgement]]] = {}
    for judgement in judgements:
        for service in judgement.services:
            spans.setdefault(service.protocol, []).append((service.ports, judgement))
    return spans


def segments(spans: Sequence[tuple[PortRange, T]]) -> Iterator[tuple[PortRange, tuple[T, ...]]]:
    """Ranges that don't overlap, each with all whose ranges hold it, in the order of their first mention."""
    edges = sorted({edge for ports, _ in spans for edge in (ports.first, ports.last + 1)})
    found: list[tuple[PortRange, tuple[T, ...]]] = []
    for first, after in pairwise(edges):
        holders: list[T] = []
        for ports, holder in spans:
            if ports.first <= first <= ports.last and holder not in holders:
                holders.append(holder)
        if found and found[-1][0].last == first - 1 and found[-1][1] == tuple(holders):
            found[-1] = PortRange(found[-1][0].first, after - 1), tuple(holders)
        elif holders:
            found.append((PortRange(first, after - 1), tuple(holders)))
    yield from found
