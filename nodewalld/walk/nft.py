"""Base chains of nf_tables that aren't iptables': `nft -j list table` as chains that a packet is walked through.

Law: what a statement or an expression means is what nft(8) says; one that isn't listed here can't be decided, and is
told as it was printed. A rule that does more than one thing to a packet is not taken apart: what it does is unknown.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from nodewalld.core.shield.rules import TABLE
from nodewalld.walk.matches import Condition, undecided
from nodewalld.walk.nft_values import Sets, compare, left_side
from nodewalld.walk.packet import State
from nodewalld.walk.rules import Chain, Option, Parsed, Rule
from nodewalld.walk.world import SHIELD, BaseChain, World

_NO_EFFECT = frozenset({"counter", "log", "comment"})
_VERDICTS = {"accept": "ACCEPT", "drop": "DROP", "reject": "REJECT", "return": "RETURN", "queue": "NFQUEUE"}
_REWRITES = {"dnat": "--to-destination", "snat": "--to-source", "redirect": "--to-ports", "masquerade": "--to-ports"}
_DRAWN = frozenset({"numgen", "jhash", "symhash"})
_HOOKS = {name.lower(): name for name in ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")}

_NOTHING, _SOMETHING = (Parsed((), target, goto=False, options=()) for target in ("", "?"))

Json = Mapping[str, Any]


@dataclass(frozen=True)
class NftRule(Rule):
    """A rule with its conditions and its one deed already understood, or known not to be."""

    conditions: tuple[Condition, ...] = ()
    deed: Parsed = _NOTHING
    entry: str = ""

    @cached_property
    def parsed(self) -> Parsed:
        """Its deed, in iptables' words."""
        return self.deed

    @cached_property
    def tag(self) -> str:
        """The entry of the configuration that it is of."""
        return self.entry


@dataclass(frozen=True)
class NftChain(Chain):
    """A chain whose rules are made already."""

    made: tuple[NftRule, ...] = ()

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Its rules in their order."""
        return self.made


def read_table(items: Iterable[Json]) -> tuple[BaseChain, ...]:
    """The base chains of one table of family ip, ip6 or inet, as `nft -j list table` prints it."""
    table = _Table()
    for item in items:
        table.take(item)
    return tuple(table.base_chains())


@dataclass
class _Table:
    """Collects a table's chains, sets and rules."""

    name: str = ""
    family: str = ""
    declared: dict[str, Json] = field(default_factory=dict)
    rules: dict[str, list[Json]] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)

    def take(self, item: Json) -> None:
        if "table" in item:
            self.name, self.family = str(item["table"]["name"]), str(item["table"]["family"])
        elif "chain" in item:
            self.declared[str(item["chain"]["name"])] = item["chain"]
        elif "set" in item or "map" in item:
            found = item.get("set") or item["map"]
            self.sets[str(found["name"])] = found.get("elem", [])
        elif "rule" in item:
            self.rules.setdefault(str(item["rule"]["chain"]), []).append(item["rule"])

    def base_chains(self) -> Iterable[BaseChain]:
        chains = {name: self._chain(name, chain) for name, chain in self.declared.items()}
        for name, chain in self.declared.items():
            if chain.get("hook") in _HOOKS:
                shield = (self.family, self.name) == ("inet", TABLE)
                yield BaseChain(
                    f"{SHIELD if shield else f'nft table {self.family} {self.name}'}, chain {name}",
                    _HOOKS[chain["hook"]],
                    int(chain.get("prio", 0)),
                    name,
                    chains,
                    nat=chain.get("type") == "nat",
                )

    def _chain(self, name: str, chain: Json) -> Chain:
        made: list[NftRule] = []
        for number, rule in enumerate(self.rules.get(name, ()), 1):
            made += self._rules(name, number, rule)
        policy = str(chain.get("policy", "accept")).upper() if "hook" in chain else ""
        return NftChain(name, policy, tuple(rule.text for rule in made), tuple(made))

    def _rules(self, chain: str, number: int, rule: Json) -> Iterable[NftRule]:
        """One rule, or for a verdict map as many as it has elements: the first that matches decides."""
        expressions: Sequence[Json] = rule.get("expr", ())
        entry = str(rule.get("comment", "")) if self.name == TABLE else ""
        conditions: list[Condition] = []
        deeds: list[Json] = []
        maps: list[Json] = []
        for expression in expressions:
            kind = next(iter(expression), "")
            if kind == "match":
                conditions.append(self._condition(expression["match"]))
            elif kind == "vmap":
                maps.append(expression["vmap"])
            elif kind == "limit":
                conditions.append(Condition(render(expression), undecided, lasting=False))
            elif kind not in _NO_EFFECT:
                deeds.append(expression)
        text = " ".join(filter(None, map(render, expressions)))
        if not maps:
            deed = _deed(deeds[0]) if len(deeds) == 1 else None
            deed = deed or (_SOMETHING if deeds else _NOTHING)
            yield NftRule(chain, number, text, tuple(conditions), deed, entry)
        elif len(maps) > 1 or deeds:
            yield NftRule(chain, number, text, tuple(conditions), _SOMETHING, entry)
        else:
            yield from self._mapped(chain, number, tuple(conditions), maps[0], entry)

    def _mapped(
        self, chain: str, number: int, conditions: tuple[Condition, ...], vmap: Json, entry: str
    ) -> Iterable[NftRule]:
        data = vmap["data"]
        elements = self.sets.get(data[1:], ()) if isinstance(data, str) else data.get("set", ())
        drawn = next(iter(vmap["key"].values())) if next(iter(vmap["key"]), "") in _DRAWN else {}
        for index, (key, verdict) in enumerate(elements, 1):
            more = self._condition({"op": "==", "left": vmap["key"], "right": key})
            if drawn:
                # By lot or by hash, one of them it is: the last, if none of the others.
                certain = index == len(elements) == drawn.get("mod")
                more = replace(more, judge=_certain if certain else undecided)
            deed = _deed(verdict) or _SOMETHING
            text = " ".join((*(c.spelled for c in conditions), more.spelled, ":", render(verdict)))
            yield NftRule(chain, number, text, (*conditions, more), deed, entry)

    def _condition(self, match: Json) -> Condition:
        left, right, op = match["left"], match["right"], str(match.get("op", "=="))
        read = left_side(left)
        sets = self.sets

        def judge(state: State, world: World) -> bool | None:
            value = read(state, world) if read else None
            return compare(value, op, right, sets, state) if read else None

        # A rule whose expression has no value for a packet does not match it, negated or not: so it is no negation.
        return Condition(render({"match": match}), judge)


def _certain(_state: State, _world: World) -> bool:
    return True


def _deed(statement: Json) -> Parsed | None:
    """What a statement does, in iptables' words; None if it isn't known."""
    kind = next(iter(statement), "")
    content = statement.get(kind) or {}
    if kind in {"jump", "goto"}:
        return Parsed((), str(content["target"]), goto=kind == "goto", options=())
    if kind in _VERDICTS:
        return Parsed((), _VERDICTS[kind], goto=False, options=())
    if kind == "notrack":
        return Parsed((), "NOTRACK", goto=False, options=())
    if kind in _REWRITES:
        return _rewrite(kind, content)
    if kind == "mangle":
        return _mark(content)
    return None


def _rewrite(kind: str, content: Json) -> Parsed | None:
    address, port = content.get("addr"), content.get("port")
    if not isinstance(address, str | None) or not isinstance(port, int | None):
        return None
    target = kind.upper()
    if kind in {"redirect", "masquerade"}:
        words = (str(port),) if port else ()
    else:
        host = address or ""
        words = (f"[{host}]:{port}" if ":" in host and port else f"{host}:{port}" if port else host,)
    options = (Option(_REWRITES[kind], words),) if words else ()
    return Parsed((), target, goto=False, options=options)


def _mark(content: Json) -> Parsed | None:
    """`meta mark set` or `ct mark set`, to a number, or to the mark with bits set or cleared."""
    target = {"meta": "MARK", "ct": "CONNMARK"}.get(next(iter(content["key"]), ""), "")
    if not target or next(iter(content["key"].values())) != {"key": "mark"}:
        return None
    value = content["value"]
    if isinstance(value, int):
        word = f"{value:#x}/0xffffffff"
    elif value == {"ct": {"key": "mark"}} and target == "MARK":
        return Parsed((), "CONNMARK", goto=False, options=(Option("--restore-mark"),))
    elif value == {"meta": {"key": "mark"}} and target == "CONNMARK":
        return Parsed((), "CONNMARK", goto=False, options=(Option("--save-mark"),))
    elif isinstance(value, dict) and len(value) == 1:
        (operator, sides), *_ = value.items()
        if operator not in {"|", "&", "^"} or sides[0] != content["key"] or not isinstance(sides[1], int):
            return None
        bits = sides[1]
        word = {"|": f"{bits:#x}/{bits:#x}", "&": f"0x0/{~bits & 0xFFFFFFFF:#x}", "^": f"{bits:#x}/0x0"}[operator]
    else:
        return None
    return Parsed((), target, goto=False, options=(Option("--set-xmark", (word,)),))


# --- as people read it


def render(value: object) -> str:
    """A part of `nft -j`'s output, much as nft prints it; what isn't known stays JSON."""
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list):
        return "{ " + ", ".join(render(each) for each in value) + " }"
    if not isinstance(value, dict) or len(value) != 1:
        return "" if value is None else json.dumps(value)
    (kind, content), *_ = value.items()
    if kind in _RENDERED:
        return str(_RENDERED[kind](content))
    return kind if content is None else f"{kind} {json.dumps(content)}"


def _render_match(content: Json) -> str:
    op = str(content.get("op", "=="))
    between = "" if op in {"==", "in"} else f"{op} "
    return f"{render(content['left'])} {between}{render(content['right'])}"


def _render_keyed(word: str) -> Any:
    return lambda content: " ".join(filter(None, (word, str(content.get("dir", "")), str(content["key"]))))


def _render_payload(content: Json) -> str:
    if "protocol" in content:
        return f"{content['protocol']} {content['field']}"
    return f"@{content.get('base')},{content.get('offset')},{content.get('len')}"


def _render_nat(kind: str) -> Any:
    def render_it(content: Json | None) -> str:
        to = render((content or {}).get("addr")) + (
            f":{render(content['port'])}" if content and "port" in content else ""
        )
        return f"{kind} to {to}" if to else kind

    return render_it


_RENDERED: Mapping[str, Any] = {
    "match": _render_match,
    "meta": _render_keyed("meta"),
    "ct": _render_keyed("ct"),
    "payload": _render_payload,
    "fib": lambda content: f"fib {' . '.join(content.get('flags', ()))} {content.get('result')}",
    "prefix": lambda content: f"{content['addr']}/{content['len']}",
    "range": lambda content: f"{render(content[0])}-{render(content[1])}",
    "set": lambda content: render(content if isinstance(content, list) else [content]),
    "concat": lambda content: " . ".join(render(each) for each in content),
    "numgen": lambda content: f"numgen {content.get('mode')} mod {content.get('mod')}",
    "^": lambda content: f"{render(content[0])} ^ {render(content[1])}",
    "&": lambda content: f"{render(content[0])} & {render(content[1])}",
    "|": lambda content: f"{render(content[0])} | {render(content[1])}",
    "jump": lambda content: f"jump {content['target']}",
    "goto": lambda content: f"goto {content['target']}",
    "counter": lambda _content: "",
    "log": lambda _content: "log",
    "limit": lambda content: f"limit rate {content.get('rate')}/{content.get('per')}",
    "mangle": lambda content: f"{render(content['key'])} set {render(content['value'])}",
    "reject": lambda content: f"reject with {content.get('expr')}" if content else "reject",
    **{kind: _render_nat(kind) for kind in _REWRITES},
}
