"""A node refused by iptables alone, by the shield alone, or by both."""

from lab.daemon import Daemon
from lab.node import Node

_RAISE = """
import sys
from pathlib import Path
from nodewalld.commands import offline, shielding
from nodewalld.configuration.load import load
from nodewalld.kernel.nftshield import ShieldTable, stamp
table, shield = ShieldTable(), shielding.wanted(load(Path(sys.argv[1])), offline.environment())
if shield:
    table.write(shield, stamp(shield))
    assert table.holds_rules(shield) and table.holds_sets(shield)
else:
    table.remove()
"""
_TAKE_OUT = "from nodewalld.kernel.nftshield import ShieldTable; ShieldTable().remove()"
PLAIN = {"NODEWALLD_PLAIN_SHIELD": "1"}


def raise_alone(daemon: Daemon) -> None:
    """Write the shield of a daemon's configuration, by nobody who stays."""
    daemon.node.run([daemon.node.python(), "-c", _RAISE, str(daemon.config_directory)])


def take_out(node: Node) -> None:
    """Take the shield out, which its owner has left."""
    node.run([node.python(), "-c", _TAKE_OUT])


def stands(node: Node) -> bool:
    """Whether there is a table of ours."""
    return "table inet nodewalld" in node.run("nft list tables").stdout
