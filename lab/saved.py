"""What iptables-save prints, read as text: the sets that it names, and what in it is foreign."""

import re

TABLES = ("raw", "mangle", "nat", "filter", "security")

_SET = re.compile(r"--match-set (\S+) ((?:src|dst)(?:,(?:src|dst))*)")
_SET_TYPES = {1: "hash:net", 2: "hash:net,port", 3: "hash:ip,port,net"}


def sets_of(rules: str, family: str) -> str:
    """`ipset restore` input that makes every set named by --match-set in the rules, empty."""
    inet = "inet6" if family == "ipv6" else "inet"
    found = {name: len(flags.split(",")) for name, flags in _SET.findall(rules)}
    return "".join(f"create {name} {_SET_TYPES[size]} family {inet}\n" for name, size in found.items())


_COUNTERS = re.compile(r"\[\d+:\d+\]\s*")
_OURS = re.compile(r'--comment "?nodewalld:')


def foreign(saved: str) -> str:
    """What is foreign in the output of iptables-save: see `Node.snapshot`."""
    tables: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in saved.splitlines():
        if line.startswith("*"):
            lines = tables.setdefault(line[1:], [])
        elif line.startswith(":"):
            if not line.startswith(":NODEWALL"):
                lines.append(_COUNTERS.sub("", line).rstrip())
        elif line.startswith(("-A", "[")):
            rule = _COUNTERS.sub("", line, count=1)
            if not rule.startswith("-A NODEWALL") and not _OURS.search(rule):
                lines.append(rule)
        elif "incompatible" in line:
            tables.setdefault(line, []).append(line)
    kept = {name: content for name, content in tables.items() if not all(map(_is_untouched_chain, content))}
    order = sorted(kept, key=lambda name: (TABLES.index(name) if name in TABLES else len(TABLES), name))
    return "".join(f"*{name}\n" + "".join(f"{line}\n" for line in kept[name]) for name in order)


def _is_untouched_chain(line: str) -> bool:
    return line.startswith(":") and line.endswith(" ACCEPT")
