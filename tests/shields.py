"""A node refused by iptables alone, by the shield alone, or by both."""

from collections.abc import Iterator

from lab.daemon import Daemon
from lab.node import Node
from nodewalld.service import client

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
_OTHER_SHAPE = """
import sys
from dataclasses import replace
from pathlib import Path
from nodewalld.commands import offline, shielding
from nodewalld.configuration.load import load
from nodewalld.core.shield.rules import Among, Base, Chain, Dispatch, Hook, Stage, Verdict
from nodewalld.kernel.nftshield import ShieldTable, stamp

def then(one):
    if isinstance(one, Verdict):
        return replace(one, chain=one.chain and f"other-{one.chain}")
    return replace(one, name=f"other-{one.name}") if isinstance(one, Dispatch) else one

def rule(one):
    matches = (replace(m, name=f"other-{m.name}") if isinstance(m, Among) else m for m in one.matches)
    return replace(one, entry=f"other/{one.entry}", matches=tuple(matches), then=then(one.then))

shield = shielding.wanted(load(Path(sys.argv[1])), offline.environment())
chains = [replace(c, name=f"other-{c.name}", rules=tuple(map(rule, c.rules))) for c in shield.chains]
maps = [replace(m, name=f"other-{m.name}", verdicts=tuple((p, then(v)) for p, v in m.verdicts)) for m in shield.maps]
sets = [replace(s, name=f"other-{s.name}") for s in shield.sets]
more = Chain("more", (), Base(Hook.OUTPUT, Stage.FIRST))
other = replace(shield, chains=(*chains, more), sets=tuple(sets), maps=tuple(maps))
ShieldTable().write(other, stamp(other))
"""
_TAKE_OUT = "from nodewalld.kernel.nftshield import ShieldTable; ShieldTable().remove()"
OFF = '[daemon]\nshield = "off"\n'
PLAIN = {"NODEWALLD_PLAIN_SHIELD": "1"}


def raise_alone(daemon: Daemon) -> None:
    """Write the shield of a daemon's configuration, by nobody who stays."""
    daemon.node.run([daemon.node.python(), "-c", _RAISE, str(daemon.config_directory)])


def put(daemon: Daemon, text: str, more: str = "") -> None:
    """Have a running daemon take this configuration."""
    daemon.configure({"nodewalld.toml": text, "conf.d/more.toml": more})
    client.call(daemon.runtime_directory / "control.sock", {"command": "reload"}, 30.0)


def each_way(daemon: Daemon, text: str) -> Iterator[str]:
    """Have a configuration in iptables alone, then in both, then in the shield alone, as long as each is looked at."""
    put(daemon, text, OFF)
    yield "iptables"
    put(daemon, text)
    assert daemon.ctl("plan").returncode == 0
    yield "both"
    client.call(daemon.runtime_directory / "control.sock", {"command": "remove"}, 10.0)
    raise_alone(daemon)
    yield "shield"
    take_out(daemon.node)


def leave_another_shape(daemon: Daemon) -> None:
    """Make its shield, while it is dead, one that another version might have left: the same by all other names."""
    daemon.node.run([daemon.node.python(), "-c", _OTHER_SHAPE, str(daemon.config_directory)])


def take_out(node: Node) -> None:
    """Take the shield out, which its owner has left."""
    node.run([node.python(), "-c", _TAKE_OUT])


def stands(node: Node) -> bool:
    """Whether there is a table of ours."""
    return "table inet nodewalld" in node.run("nft list tables").stdout
