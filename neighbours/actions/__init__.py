"""Programs that write rules, and what each of them does: the table that suites and measurements share."""

from neighbours.actions.docker import DOCKER28, DOCKERD
from neighbours.actions.firewalld import BOTH, FIREWALLD
from neighbours.actions.kubernetes import FELIX, FLANNEL, KUBE_PROXY, KUBE_ROUTER
from neighbours.actions.others import CNI, FAIL2BAN, PODMAN, UFW
from neighbours.actions.person import PERSON
from neighbours.actions.stage import Neighbour

_EVERYBODY = (
    PERSON,
    DOCKERD,
    DOCKER28,
    *FIREWALLD,
    BOTH,
    CNI,
    *UFW,
    FAIL2BAN,
    PODMAN,
    KUBE_PROXY,
    *FELIX,
    KUBE_ROUTER,
    FLANNEL,
)
NEIGHBOURS: dict[str, Neighbour] = {neighbour.name: neighbour for neighbour in _EVERYBODY}
"""Everybody, in the order of the table."""
