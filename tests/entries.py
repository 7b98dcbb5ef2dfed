"""Entries that the configurations of several tests have in common."""

FRIENDS = """
[set.friends]
entries = ["10.90.0.7", "fd90::7"]
"""
"""Of the lab's parties `ALLOWED`."""

VAULT = """
[[port]]
name = "vault"
ports = [31002]
allow = ["@friends"]
"""
"""A NodePort of the captured kube-proxy, for friends only."""

RELAY = """
[[port]]
name = "relay"
ports = [30001]
action = "redirect"
"""
"""The other NodePort, shut."""

DOCKER_USER = """
[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"
"""


def refusals(protocol: str, *foes: str) -> str:
    """Ports 7001 to 7003 of the node, each shut in another way, and 7011 through it, shut to foes by a set."""
    ports = (("shut", 7001, "drop"), ("answered", 7002, "reject"), ("closed", 7003, "redirect"))
    shut = "".join(
        f'\n[[port]]\nname = "{name}"\nports = [{port}]\nprotocol = ["{protocol}"]\naction = "{action}"\n'
        for name, port, action in ports
    )
    return f"""
[set.foes]
entries = {list(foes)}
{shut}
[[forward]]
name = "through"
source = "@foes"
protocol = "{protocol}"
ports = [7011]
action = "drop"
"""
