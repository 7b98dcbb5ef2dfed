"""The arrays of tables: the keys of `[[port]]`, `[[forward]]`, `[[rule]]` and `[[jump]]`, and what they
mean together.

Law: a key is described once, in the table of its kind; what several keys can't say together is judged after
all of them were read. An entry with a key that can't be read gives no value, only problems.
"""

from nodewalld.configuration.peers import allowed, destination, interfaces, selector
from nodewalld.configuration.positions import position
from nodewalld.configuration.reading import (
    FieldError,
    Key,
    Reading,
    Section,
    Shape,
    any_of,
    listed,
    read_table,
    takes,
)
from nodewalld.configuration.rules import FOREIGN_JUMPS, literal_families, refuse_target, rule_text
from nodewalld.configuration.tree import Node, child_key, show
from nodewalld.configuration.values import (
    CHAIN,
    TRANSPORTS,
    boolean,
    chain,
    choice,
    name,
    pattern,
    ports,
    protocol,
    text,
)
from nodewalld.core.config import (
    Action,
    ForwardEntry,
    JumpEntry,
    PortEntry,
    RuleEntry,
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


@takes(any_of({"enum": list(_PORT_ACTIONS)}, pattern("redirect:[0-9]{1,9}(?:[-:][0-9]{1,9})?")))
def _action(node: Node, reading: Reading) -> tuple[Action, int]:
    """The action of a port, and the closed port of a redirect."""
    word, colon, closed = text(node, reading, example='such as "drop"').partition(":")
    if word != "redirect" or not colon:
        return choice(_PORT_ACTIONS)(node, reading)
    span = ports(Node(closed, node.where, node.key), reading)
    if span.first != span.last:
        raise FieldError(node, f"{node.shown} goes to many ports", '"redirect:65535"')
    return Action.REDIRECT, span.first


@takes(pattern(f"(?!(?:cali-|felix-|(?:{'|'.join((*_BUILTIN_CHAINS, *_VERDICTS))})$)){CHAIN}"))
def _jump_target(node: Node, reading: Reading) -> str:
    called = chain(node, reading)
    refuse_target(node, called, FOREIGN_JUMPS)
    if called in _BUILTIN_CHAINS:
        raise FieldError(node, f"{called} is a built-in chain, which nothing can jump to", "a chain of its own name")
    if called in _VERDICTS:
        raise FieldError(node, f"{called} is a verdict, not a chain", f'[[rule]] with rule = "-j {called}"')
    return called


@takes({"const": True})
def _no_trial(node: Node, reading: Reading) -> bool:
    """`enforce` of a jump, which refuses nothing that could be counted instead."""
    if not boolean(node, reading):
        raise FieldError(node, "a jump refuses nothing, so there is nothing to count instead", "leave out the [[jump]]")
    return True


_NAME = Key(name, "what messages, chains and counters call it; unique among its kind", example='name = "..."')
_POSITION = Key(position, "see [Positions](#positions)", default="early")
ENFORCE = Key(
    boolean,
    "`false`: count (and log) what would be refused, refuse nothing. `nodewallctl show` has the numbers; a packet "
    "counts once",
    default=True,
)
"""What every kind of entry can be told."""

_FAMILIES = Key(
    FAMILIES, "left out: those of `[daemon]`, or only the one whose addresses the text spells out", absent=()
)
_TABLE = Key(choice(_TABLES), '`"raw"`, `"mangle"`, `"nat"`, `"filter"`, `"security"`', example='table = "filter"')
_INTERFACES = (
    'an interface or a list; `"eth+"` for every name that begins so; `"@default-route"` for the interfaces of default '
    'routes. `"!docker0"` for all but; in a list each element is negated, or none. `""` is any'
)
_SELECTOR = 'an address, CIDR or `"@SET"`, or a list; negated as in `in`: `"!@cluster_nodes"`'
_PORTS_EXAMPLE = '[31002, "32000-32010"]'

PORT = Section(
    Shape.LISTED,
    "Who may reach ports of this node, judged as the client dialled it, before any DNAT",
    {
        "name": _NAME,
        "ports": Key(
            listed(ports, example=_PORTS_EXAMPLE, empty="and no port would be guarded"),
            f"numbers and ranges: `{_PORTS_EXAMPLE}`",
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
            'one or a list of `"tcp"`, `"udp"`, `"sctp"`',
            field="protocols",
            default=["tcp"],
        ),
        "allow": Key(
            allowed, 'addresses, CIDRs, `"@SET"`, `"any"`; one or a list. Left out or empty: nobody', default=[]
        ),
        "deny": Key(
            allowed,
            "taken out of `allow`; the same kinds. With an empty `allow` it does nothing, and is warned of",
            default=[],
        ),
        "action": Key(
            _action,
            '`"drop"`; `"reject"` (TCP reset, ICMP port unreachable for the rest); `"redirect"` or `"redirect:PORT"`: '
            "to a closed port, 65535 by default, which answers as closed ports do; not for sctp",
            default="drop",
        ),
        "from_node": Key(
            boolean,
            "`true`: connections that this node opens to itself are judged by the same `allow`, in which "
            "`127.0.0.0/8` and `::1` must then be listed",
            default=False,
        ),
        "destination": Key(
            destination,
            '`"local"`: what this node answers, its broadcast, multicast and anycast addresses included; `"any"`; or a '
            "list of addresses and CIDRs, say those of a LoadBalancer. Traffic that only passes through the node is "
            'untouched by `"local"`',
            default="local",
        ),
        "log": Key(
            boolean,
            "also log what is refused, in the kernel's log, each packet once, at most 5 a second (10 at first), with "
            "the prefix `nodewall:NAME `",
            default=False,
        ),
        "enforce": ENFORCE,
    },
)

FORWARD = Section(
    Shape.LISTED,
    "Routed traffic; what refuses lets replies and RELATED ICMP pass",
    {
        "name": _NAME,
        "action": Key(choice(_FORWARD_ACTIONS), '`"accept"`, `"drop"` or `"reject"`', example='action = "reject"'),
        "in": Key(interfaces, _INTERFACES, field="inside", default=""),
        "out": Key(interfaces, "the same for the interface it leaves by", field="outside", default=""),
        "source": Key(selector, _SELECTOR, default="any"),
        "destination": Key(selector, "the same for where it goes to", default="any"),
        "protocol": Key(protocol, 'a name (`"tcp"`, `"vrrp"`, `"gre"` ...) or a number from 1 to 255', default="any"),
        "ports": Key(
            listed(ports, example=_PORTS_EXAMPLE),
            "destination ports, as in `[[port]]`; needs protocol `tcp`, `udp` or `sctp`. `[]` is any",
            default=[],
        ),
        "position": Key(
            position, "see [Positions](#positions); left out, the place is chosen as told below", absent=None
        ),
        "log": PORT.keys["log"],
        "enforce": ENFORCE,
    },
)

RULE = Section(
    Shape.LISTED,
    "Anything that iptables can say",
    {
        "name": _NAME,
        "table": _TABLE,
        "chain": Key(
            chain,
            'a built-in chain of that table, or a foreign one such as `"DOCKER-USER"`. While a foreign chain is '
            "missing the rule waits, and the daemon is degraded and says so",
            example='chain = "INPUT"',
        ),
        "rule": Key(
            rule_text,
            "what iptables takes after `-A CHAIN`; no commands (`-A`, `-I`, `-t` ...), no jumps to `cali-*`, `felix-*` "
            "or `NODEWALL*`, no comments that begin with `cali:` or `nodewalld:`",
            field="text",
            example='rule = "-p tcp --dport 22 -j ACCEPT"',
        ),
        "families": _FAMILIES,
        "position": _POSITION,
        "enforce": Key(boolean, "`false`: the match counts, without its target", default=True),
    },
)

JUMP = Section(
    Shape.LISTED,
    "A foreign chain that must be reached from another one, exactly once",
    {
        "name": _NAME,
        "table": _TABLE,
        "from": Key(chain, "the chain that jumps", field="from_chain", example='from = "FORWARD"'),
        "to": Key(
            _jump_target,
            "made if it is not there, but never a `KUBE-*`, `cali-*` or `CNI-*` chain: such a jump waits; jumps to "
            "`cali-*` and `felix-*` are errors, for Felix deletes them",
            field="to_chain",
            example='to = "DOCKER-USER"',
        ),
        "families": Key(FAMILIES, "left out: those of `[daemon]`", absent=()),
        "position": _POSITION,
        "enforce": Key(_no_trial, "`true`: a jump refuses nothing that could be counted instead", default=True),
    },
)


def port(node: Node, reading: Reading) -> tuple[PortEntry, ...]:
    """A `[[port]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, PORT.keys, reading)
    action, redirect_to = fields.get("action", _PORT_ACTIONS["drop"])
    if action is Action.REDIRECT:
        if "sctp" in fields.get("protocols", ()):
            reading.refuse(_at(node, "action"), "redirect does not work with sctp", '"drop" or "reject"')
        if any(span.first <= redirect_to <= span.last for span in fields.get("ports", ())):
            reading.refuse(_at(node, "action"), f"redirects to {redirect_to}, which is one of ports", "a closed port")
    if fields.get("deny") and fields.get("allow") == ():
        message = "is taken out of allow, and allow is empty"
        reading.warn(_at(node, "deny"), "deny-outside-allow", message, 'allow = ["any"]')
    if len(fields) < len(PORT.keys):
        return ()
    return (PortEntry(**fields | {"action": action, "redirect_to": redirect_to}, where=node.where),)


def forward(node: Node, reading: Reading) -> tuple[ForwardEntry, ...]:
    """A `[[forward]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, FORWARD.keys, reading)
    if fields.get("ports") and fields.get("protocol", "tcp") not in TRANSPORTS:
        reading.refuse(_at(node, "ports"), "need a protocol that has ports", 'protocol = "tcp", "udp" or "sctp"')
    return () if len(fields) < len(FORWARD.keys) else (ForwardEntry(**fields, where=node.where),)


def rule(node: Node, reading: Reading) -> tuple[RuleEntry, ...]:
    """A `[[rule]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, RULE.keys, reading)
    _judge_chain(_at(node, "chain"), fields.get("table"), fields.get("chain"), reading)
    if len(fields) < len(RULE.keys):
        return ()
    spelled = literal_families(fields["text"])
    narrowed = tuple(spelled) if len(spelled) == 1 else reading.families
    fields["families"] = _families(node, fields["families"] or narrowed, reading)
    return (RuleEntry(**fields, where=node.where),)


def jump(node: Node, reading: Reading) -> tuple[JumpEntry, ...]:
    """A `[[jump]]`; none when something in it is wrong, which is then noted."""
    fields = read_table(node, JUMP.keys, reading)
    _judge_chain(_at(node, "from"), fields.get("table"), fields.get("from_chain"), reading)
    if "to_chain" in fields and fields["to_chain"] == fields.get("from_chain"):
        reading.refuse(_at(node, "to"), "is the chain that it is jumped to from", "two chains")
    if len(fields) < len(JUMP.keys):
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
