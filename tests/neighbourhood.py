"""What neighbours do, in iptables commands drawn by dice: the same on a node with a daemon and on its twin without.

Law: what a move leaves of foreign rules depends on foreign rules alone. So nothing is deleted by number, nothing is
put at a number but the first, and whoever looks before it writes looks only for rules of its own.

`{t}` is iptables or ip6tables, `{pods}` a network of the family.
"""

import random
from collections.abc import Callable

from lab.node import BackendName

Lines = list[str]
Move = Callable[[random.Random], Lines]

TOOLS = {"ipv4": ("iptables", "10.42.0.0/16"), "ipv6": ("ip6tables", "fd42::/16")}
TABLES = "raw mangle nat filter security"


def _top(chain: str, rule: str, table: str = "filter") -> Lines:
    """Delete and insert: two commands, and for a moment the rule is nowhere."""
    start = "{t} -w 20 -t " + table
    return [f"{start} -D {chain} {rule}", f"{start} -I {chain} {rule}"]


def _ensure(chain: str, rule: str, how: str = "-I", table: str = "filter") -> Lines:
    """Written where it is missing, wherever it may stand: kube-proxy, flannel, CNI plugins."""
    start = "{t} -w 20 -t " + table
    return [f"{start} -C {chain} {rule} || {start} {how} {chain} {rule}"]


def _restore(table: str, *lines: str, flush: bool = False) -> Lines:
    text = "\\n".join((f"*{table}", *lines, "COMMIT", ""))
    return [f"printf '{text}' | {{t}}-restore -w 20" + ("" if flush else " --noflush")]


def _chain(*names: str, table: str = "filter") -> Lines:
    return [f"{{t}} -w 20 -t {table} -N {name}" for name in names]


def docker_start(dice: random.Random) -> Lines:
    jumps = ("DOCKER-ISOLATION-STAGE-1", "DOCKER-USER")
    lines = [*_chain(*jumps), "{t} -w 20 -P FORWARD " + dice.choice(("DROP", "ACCEPT"))]
    return lines + [line for jump in jumps for line in _top("FORWARD", f"-j {jump}")]


def docker_network(dice: random.Random) -> Lines:
    bridge = f"br-{dice.randrange(5)}"
    if dice.random() < 0.4:
        return [f"{{t}} -w 20 -D FORWARD -o {bridge} -j ACCEPT"]
    return [*_chain("DOCKER-USER"), f"{{t}} -w 20 -I FORWARD -o {bridge} -j ACCEPT", *_top("FORWARD", "-j DOCKER-USER")]


def kube_proxy(dice: random.Random) -> Lines:
    services = [
        f"-A KUBE-SERVICES -p tcp -m tcp --dport {dice.randrange(1, 60000)} -j RETURN"
        for _ in range(dice.randrange(40))
    ]
    return [
        *_restore("nat", ":KUBE-SERVICES - [0:0]", *services),
        *_ensure("PREROUTING", "-j KUBE-SERVICES", table="nat"),
        *_chain("KUBE-FORWARD"),
        *_ensure("FORWARD", "-j KUBE-FORWARD"),
        *_chain("KUBE-PROXY-CANARY", table="mangle"),
    ]


def felix_insert(dice: random.Random) -> Lines:
    table, chain = dice.choice((("filter", "FORWARD"), ("filter", "INPUT"), ("mangle", "PREROUTING")))
    name = f"cali-{chain}"
    return [
        *_chain(name, table=table),
        *_ensure(chain, f"-j {name}", table=table),
        *_restore(table, f"-D {chain} -j {name}", f"-I {chain} -j {name}"),
    ]


def felix_append(dice: random.Random) -> Lines:
    rule = "-m mark --mark 0x10000/0x10000 -j ACCEPT"
    return [*_ensure("FORWARD", rule, "-A"), *_restore("filter", f"-D FORWARD {rule}", f"-A FORWARD {rule}")]


def flannel(dice: random.Random) -> Lines:
    return [*_chain("FLANNEL-FWD"), *_ensure("FORWARD", "-j FLANNEL-FWD", "-A")]


def kube_router(dice: random.Random) -> Lines:
    """Save, take a while, and write all of it back: what changed in between is undone."""
    pause = dice.choice(("0", "0.02", "0.1"))
    return [f"{{t}}-save -t filter > /run/kube-router; sleep {pause}; {{t}}-restore -w 20 < /run/kube-router"]


def fail2ban(dice: random.Random) -> Lines:
    return [*_chain("f2b-sshd"), *_ensure("INPUT", "-p tcp -j f2b-sshd"), "{t} -w 20 -I f2b-sshd -s {pods} -j REJECT"]


def tailscale(dice: random.Random) -> Lines:
    return _ensure("FORWARD", "-o ts0 -j MARK --set-xmark 0x40000/0xff0000", "-A", table="mangle")


def anchors(dice: random.Random) -> Lines:
    """In one order or the other, or one or both gone."""
    rules = ["-s {pods} -j ACCEPT", "-d {pods} -j ACCEPT"]
    dice.shuffle(rules)
    gone = ["{t} -w 20 -D FORWARD " + rule for rule in rules]
    return gone + ["{t} -w 20 -A FORWARD " + rule for rule in rules[: dice.choice((0, 1, 2, 2, 2))]]


def flush_chain(dice: random.Random) -> Lines:
    table, chain = dice.choice(
        (("filter", "FORWARD"), ("filter", "INPUT"), ("mangle", "PREROUTING"), ("mangle", "FORWARD"))
    )
    return [f"{{t}} -w 20 -t {table} -F {chain}"]


def firewalld(dice: random.Random) -> Lines:
    """Everything of all tables, chain by chain: a plain -X would fail as a whole where one chain is in use again."""
    chains = "$({t} -w 20 -t $table -S | sed -n 's/^-N //p')"
    each = "{t} -w 20 -t $table -F $chain; {t} -w 20 -t $table -X $chain"
    return [
        f"for table in {TABLES}; do {{t}} -w 20 -t $table -F; for chain in {chains}; do {each}; done; done",
        "{t} -w 20 -A INPUT -p icmp -j ACCEPT",
    ]


def persistent(dice: random.Random) -> Lines:
    """iptables-persistent: the table as it was saved, and nothing else."""
    rules = ("-A FORWARD -s {pods} -j ACCEPT", "-A FORWARD -i eth9 -j DROP", "-A FORWARD -d {pods} -j ACCEPT")
    return _restore("filter", ":INPUT ACCEPT", ":FORWARD DROP", ":OUTPUT ACCEPT", *rules, flush=True)


def nft_flush(dice: random.Random) -> Lines:
    return ["nft flush ruleset", *(f"{tool} -w 20 -A INPUT -j ACCEPT" for tool, _ in TOOLS.values())]


MOVES: tuple[Move, ...] = (
    docker_start,
    docker_network,
    kube_proxy,
    felix_insert,
    felix_append,
    flannel,
    kube_router,
    fail2ban,
    tailscale,
    anchors,
    flush_chain,
    firewalld,
    persistent,
)

# What is done to ours alone. {chain} of {table} holds {rule}, one of ours; {own} is a chain of ours.
ATTACKS = (
    "{t} -w 20 -t {table} -D {chain} {rule}",
    "{t} -w 20 -t {table} -A {chain} {rule}",
    "{t} -w 20 -t {table} -D {chain} {rule}; {t} -w 20 -t {table} -A {chain} {rule}",
    "{t} -w 20 -t {table} -F {own}",
    "{t} -w 20 -t {table} -I {own} -j ACCEPT",
    "{t} -w 20 -t {table} -E {own} RENAMED",
)


def moves(backend: BackendName) -> tuple[Move, ...]:
    return (*MOVES, nft_flush) if backend == "nft" else MOVES


def filled(lines: Lines, family: str) -> Lines:
    tool, pods = TOOLS[family]
    return [line.replace("{t}", tool).replace("{pods}", pods) for line in lines]
