"""What the compiler must know of the node: its addresses and its default routes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nodewalld.core.words import Family


@dataclass(frozen=True, slots=True)
class Environment:
    """A node as the compiler sees it, per family.

    `addresses`: this node's own, without prefix lengths; loopback and link-local ones are known without being told.
    `service_addresses`: those on kube-ipvs0, which are Services and not this node. `default_routes`: interface names.
    """

    addresses: Mapping[Family, tuple[str, ...]] = field(default_factory=dict)
    service_addresses: Mapping[Family, tuple[str, ...]] = field(default_factory=dict)
    default_routes: Mapping[Family, tuple[str, ...]] = field(default_factory=dict)
