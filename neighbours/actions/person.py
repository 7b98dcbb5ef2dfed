"""A person or a script at work with the iptables tools."""

from collections.abc import Iterator

from lab.layout import FAMILIES
from lab.node import BackendName, Node
from lab.saved import TABLES
from neighbours.actions.stage import Action, Neighbour, Stage, clear


def _nobody(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        for family in FAMILIES:
            node.run(f"cat > /run/boot.{family}", stdin=node.rules(family) or "*filter\nCOMMIT\n")
        yield Stage(node)


def _restore(stage: Stage) -> None:
    """As iptables-persistent does at boot, whatever has been added since."""
    tables = "".join(f"*{table}\n{_BUILT_IN[table]}COMMIT\n" for table in TABLES if table != "security")
    for tool in ("iptables", "ip6tables"):
        stage.node.run([f"{tool}-restore", "-w"], stdin=tables)


_BUILT_IN = {
    table: "".join(f":{chain} ACCEPT [0:0]\n" for chain in chains.split())
    for table, chains in {
        "raw": "PREROUTING OUTPUT",
        "mangle": "PREROUTING INPUT FORWARD OUTPUT POSTROUTING",
        "nat": "PREROUTING INPUT OUTPUT POSTROUTING",
        "filter": "INPUT FORWARD OUTPUT",
        "security": "INPUT FORWARD OUTPUT",
    }.items()
}


def _flush(stage: Stage) -> None:
    stage.tools(*(f"-t {table} -F" for table in TABLES))


_ACCEPT = "-s 203.0.113.0/24 -j ACCEPT"
_DOES = (
    Action(
        "iptables -I FORWARD ... -j ACCEPT",
        lambda stage: stage.node.run(f"iptables -w -I FORWARD {_ACCEPT}"),
        undo=lambda stage: stage.node.run(f"iptables -w -D FORWARD {_ACCEPT}", check=False),
    ),
    Action("iptables -F, every table", _flush),
    Action("iptables -F; -X, every table", clear),
    Action("iptables-restore of a saved file", _restore),
    Action("nft flush ruleset", lambda stage: stage.node.run("nft flush ruleset"), only="nft"),
)

PERSON = Neighbour("a person", _nobody, _DOES)
