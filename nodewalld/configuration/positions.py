"""Readers of positions and of the anchors in them."""

import re

from nodewalld.configuration.reading import (
    FieldError,
    Key,
    Reader,
    Reading,
    any_of,
    described,
    list_nodes,
    one_or_list,
    read_table,
    takes,
)
from nodewalld.configuration.tree import Node
from nodewalld.configuration.values import LINE, choice, glob, text
from nodewalld.core.config import Anchor, AnchorKind, Place, Position
from nodewalld.core.ruletext import bare_words, split

_PLACES = {place.value: Position(place) for place in (Place.FIRST, Place.EARLY, Place.LAST)}
_APPEND = re.compile(r"\s*(?:-A|--append)\s+\S+(?:\s+|$)")
_POSITION_CURE = '"first", "early", "last" or { after = [...], before = [...] }'


def _anchor(node: Node, reading: Reading) -> Anchor:
    if not isinstance(node.value, dict):
        return Anchor(AnchorKind.TARGET, _target(node, reading))
    cure = '{ rule = "..." } or { comment = "..." }'
    if len(node.value) != 1:
        raise FieldError(node, "must have exactly one key", cure)
    [(name, inner)] = node.value.items()
    if name not in _ANCHORS:
        raise FieldError(inner, "is not a known key", cure)
    return Anchor(AnchorKind(name), _ANCHORS[name](inner, reading))


def _target(node: Node, reading: Reading) -> str:
    written = text(node, reading)
    if " " in written:
        raise FieldError(node, f"{node.shown} is not a chain or target", f"{{ rule = {node.shown} }}")
    return glob(node, reading)


def _rule(node: Node, reading: Reading) -> str:
    """A whole rule; people paste it as `iptables -S` prints it, with the chain in front."""
    rule = _APPEND.sub("", text(node, reading), count=1)
    try:
        words = bare_words(split(rule))
    except ValueError as error:
        raise FieldError(node, str(error), "close the quotes") from None
    if not words:
        raise FieldError(node, "has nothing but comments", '{ comment = "..." }')
    return rule


def _comment(node: Node, reading: Reading) -> str:
    if not text(node, reading):
        raise FieldError(node, "is empty", 'a comment or glob, such as "cali:*"')
    return text(node, reading)


def _anchors(node: Node, reading: Reading) -> tuple[Anchor, ...]:
    nodes = [node] if isinstance(node.value, dict) else list_nodes(node, example='["KUBE-FORWARD"]', single=True)
    if not nodes:
        raise FieldError(node, "is empty and constrains nothing", "leave it out")
    return reading.collect(_anchor, nodes)


_ANCHORS = {"rule": _rule, "comment": _comment}
_ANCHOR = any_of(
    glob.schema,
    {
        "type": "object",
        "properties": dict.fromkeys(_ANCHORS, LINE),
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    },
)
_ANCHOR_LIST = Reader(_anchors, one_or_list(_ANCHOR, minItems=1))
_BETWEEN = {
    "after": Key(_ANCHOR_LIST, "below the last rule that matches any of these"),
    "before": Key(_ANCHOR_LIST, "above the first rule that matches any of these"),
}


@takes(any_of({"enum": list(_PLACES)}, {**described(_BETWEEN), "minProperties": 1}))
def position(node: Node, reading: Reading) -> Position:
    """A word, or the rules between which ours must stand."""
    if isinstance(node.value, str):
        return choice(_PLACES)(node, reading)
    if not isinstance(node.value, dict):
        raise FieldError(node, f"must be a string or a table, not {node.kind}", _POSITION_CURE)
    if not node.value:
        raise FieldError(node, "is empty and constrains nothing", _POSITION_CURE)
    return Position(Place.BETWEEN, **read_table(node, _BETWEEN, reading))
