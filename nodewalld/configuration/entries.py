"""The arrays of tables: the keys of `[[port]]`, `[[forward]]`, `[[rule]]` and `[[jump]]`, and what they
mean together.

Law: a key is described once, in the table of its kind; what several keys can't say together is judged after
all of them were read. An entry with a key that can't be read gives no value, only problems.
"""

from collections.abc import Mapping

from nodewalld.configuration.peers import allowed, destination, interfaces, selector
from nodewalld.configuration.positions import position
from nodewalld.configuration.reading import FieldError, Key, Reading, listed, read_table
from nodewalld.configuration.rules import FOREIGN_JUMPS, literal_families, refuse_target, rule_text
from nodewalld.configuration.tree import Node, child_key, show
from nodewalld.configuration.values import TRANSPORTS, boolean, chain, choice, name, ports, protocol, text
from nodewalld.core.config import (
    Action,
    Destination,
    ForwardEntry,
    Interfaces,
    JumpEntry,
    PortEntry,
    Position,
    RuleEntry,
    Selector,
)
from nodewalld.core.words import Family, Table

FAMILIES = listed(
    choice({family.value: family for family in Family}),
    example='["ipv4", "ipv6"]',
    empty="and no rule would be written",
    unique=True,
)
"""Reads the families of the daemon or of one entry."""

_REDIRECT_TO = 65535
_BUILTIN_CHAINS = tuple(dict.fromkeys(called for table in Table for called in table.builtin_chains))
_VERDICTS = ("ACCEPT", "DROP", "QUEUE", "RETURN")
_PORT_ACTIONS = {
    "drop": (Action.DROP, _REDIRECT_TO),
    "reject": (Action.REJECT, _REDIRECT_TO),
    "redirect": (Action.REDIRECT, _REDIRECT_TO),
}
_FORWARD_ACTIONS = {action.value: action for action in (Action.ACCEPT, Action.DROP, Action.REJECT)}
_TABLES = {table.value: table for table in Table}


def _action(node: Node, reading: Reading) -> tuple[Action, int]:
    """The action of a port, and the closed port of a redirect."""
    word, colon, closed = text(node, reading, example='such as "drop"').partition(":")
    if word != "redirect" or not colon:
        return choice(_PORT_ACTIONS)(node, reading)
    span = ports(Node(closed, node.where, node.key), reading)
    if span.first != span.last:
        raise FieldError(node, f"{node.shown} goes to many ports", '"redirect:65535"')
    return Action.REDIRECT, span.first


def _jump_target(node: Node, reading: Reading) -> str:
    called = chain(node, reading)
    refuse_target(node, called, FOREIGN_JUMPS)
    if called in _BUILTIN_CHAINS:
        raise FieldError(node, f"{called} is a built-in chain, which nothing can jump to", "a chain of its own name")
    if called in _VERDICTS:
        raise FieldError(node, f"{called} is a verdict, not a chain", f'[[rule]] with rule = "-j {called}"')
    return called


def _no_trial(node: Node, reading: Reading) -> bool:
    """`enforce` of a jump, which refuses nothing that could be counted instead."""
    if not boolean(node, reading):
        raise FieldError(node, "a jump refuses nothing, so there is nothing to count instead", "leave out the [[jump]]")
    return True


_NAME = Key(name, example='name = "..."')
_POSITION = Key(position, default=Position())
_FALSE = Key(boolean, default=False)
_TRUE = Key(boolean, default=True)
_FAMILIES = Key(FAMILIES, default=())
_TABLE = Key(choice(_TABLES), example='table = "filter"')
_NOBODY = Key(allowed, default=())
_ANY = Key(selector, default=Selector())
_ANY_INTERFACE = Key(interfaces, default=Interfaces())
_PORTS_EXAMPLE = '[31002, "32000-32010"]'

_PORT: Mapping[str, Key] = {
    "name": _NAME,
    "ports": Key(
        listed(ports, example=_PORTS_EXAMPLE, empty="and no port would be guarded"),
        example=f"ports = {_PORTS_EXAMPLE}",
    ),
    "protocol": Key(
        listed(
            choice(TRANSPORTS),
            example='["tcp"]',
            single=True,
            empty="and no port would be guarded",
            unique=True,
        ),
        field="protocols",
        default=("tcp",),
    ),
    "allow": _NOBODY,
    "deny": _NOBODY,
    "action": Key(_action, default=_PORT_ACTIONS["drop"]),
    "from_node": _FALSE,
    "destination": Key(destination, default=Destination.LOCAL),
    "log": _FALSE,
    "enforce": _TRUE,
}

_FORWARD: Mapping[str, Key] = {
    "name": _NAME,
    "in": Key(interfaces, field="inside", default=Interfaces()),
    "out": Key(interfaces, field="outside", default=Interfaces()),
    "source": _ANY,
    "destination": _ANY,
    "protocol": Key(protocol, default=""),
    "ports": Key(listed(ports, example=_PORTS_EXAMPLE), default=()),
    "action": Key(choice(_FORWARD_ACTIONS), example='action = "reject"'),
    "position": Key(position, default=None),
    "log": _FALSE,
    "enforce": _TRUE,
}

_RULE: Mapping[str, Key] = {
    "name": _NAME,
    "table": _TABLE,
    "chain": Key(chain, example='chain = "INPUT"'),
    "rule": Key(rule_text, field="text", example='rule = "-p tcp --dport 22 -j ACCEPT"'),
    "families": _FAMILIES,
    "position": _POSITION,
    "enforce": _TRUE,
}

_JUMP: Mapping[str, Key] = {
    "name": _NAME,
    "table": _TABLE,
    "from": Key(chain, field="from_chain", example='from = "FORWARD"'),
    "to": Key(_jump_target, field="to_chain", example='to = "DOCKER-USER"'),
    "families": _FAMILIES,
    "position": _POSITION,
    "enforce": Key(_no_trial, default=True),
}


def port(node: Node, reading: Reading) -> tuple[PortEntry, ...]:
    """A `[[port]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, _PORT, reading)
    action, redirect_to = fields.get("action", _PORT_ACTIONS["drop"])
    if action is Action.REDIRECT:
        if "sctp" in fields.get("protocols", ()):
            reading.refuse(_at(node, "action"), "redirect does not work with sctp", '"drop" or "reject"')
        if any(span.first <= redirect_to <= span.last for span in fields.get("ports", ())):
            reading.refuse(_at(node, "action"), f"redirects to {redirect_to}, which is one of ports", "a closed port")
    if fields.get("deny") and fields.get("allow") == ():
        message = "is taken out of allow, and allow is empty"
        reading.warn(_at(node, "deny"), "deny-outside-allow", message, 'allow = ["any"]')
    if len(fields) < len(_PORT):
        return ()
    return (PortEntry(**fields | {"action": action, "redirect_to": redirect_to}, where=node.where),)


def forward(node: Node, reading: Reading) -> tuple[ForwardEntry, ...]:
    """A `[[forward]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, _FORWARD, reading)
    if fields.get("ports") and fields.get("protocol", "tcp") not in TRANSPORTS:
        reading.refuse(_at(node, "ports"), "need a protocol that has ports", 'protocol = "tcp", "udp" or "sctp"')
    return () if len(fields) < len(_FORWARD) else (ForwardEntry(**fields, where=node.where),)


def rule(node: Node, reading: Reading) -> tuple[RuleEntry, ...]:
    """A `[[rule]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, _RULE, reading)
    _judge_chain(_at(node, "chain"), fields.get("table"), fields.get("chain"), reading)
    if len(fields) < len(_RULE):
        return ()
    spelled = literal_families(fields["text"])
    narrowed = tuple(spelled) if len(spelled) == 1 else reading.families
    fields["families"] = _families(node, fields["families"] or narrowed, reading)
    return (RuleEntry(**fields, where=node.where),)


def jump(node: Node, reading: Reading) -> tuple[JumpEntry, ...]:
    """A `[[jump]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, _JUMP, reading)
    _judge_chain(_at(node, "from"), fields.get("table"), fields.get("from_chain"), reading)
    if "to_chain" in fields and fields["to_chain"] == fields.get("from_chain"):
        reading.refuse(_at(node, "to"), "is the chain that it is jumped to from", "two chains")
    if len(fields) < len(_JUMP):
        return ()
    del fields["enforce"]
    fields["families"] = _families(node, fields["families"] or reading.families, reading)
    return (JumpEntry(**fields, where=node.where),)


def _at(node: Node, key: str) -> Node:
    """The node of a key, or, when it was left out, of its place."""
    inner = node.value.get(key) if isinstance(node.value, dict) else None
    return inner or Node(node.value, node.where, child_key(node.key, key))


def _judge_chain(node: Node, table: Table | None, called: str | None, reading: Reading) -> None:
    if table and called in _BUILTIN_CHAINS and called not in table.builtin_chains:
        reading.refuse(node, f"table {table} has no chain {called}", ", ".join(table.builtin_chains))


def _families(node: Node, wanted: tuple[Family, ...], reading: Reading) -> tuple[Family, ...]:
    """The wanted families, as far as the daemon has them."""
    families = tuple(family for family in wanted if family in reading.families)
    if not families:
        cure = f"add {', '.join(show(family) for family in wanted)} to daemon.families"
        message = "none of these is in daemon.families: it is never written"
        reading.warn(_at(node, "families"), "family-off", message, cure)
    return families
