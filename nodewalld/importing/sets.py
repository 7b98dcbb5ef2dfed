"""Sets that rules by hand name: which become `[set.NAME]`, under which name, and what is to be said of the others.

Law: nodewalld makes sets of type hash:net and takes over one that is just so; a set of another type is never touched.
What a hash:ip set holds goes to a set of another name, and the rules with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nodewalld.configuration.schema import RESERVED_SETS
from nodewalld.configuration.tree import is_name
from nodewalld.core.decide import kernel_set_name
from nodewalld.core.ruletext import join, split
from nodewalld.core.words import Family

_NAME_MAX = 19


@dataclass(frozen=True, slots=True)
class KernelSet:
    """A set as the kernel holds it; `entries` are texts, as ipset prints them."""

    type_name: str
    family: Family | None
    entries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Named:
    """What the configuration says of the sets: new names by (family, kernel's name), definitions, and remarks."""

    names: Mapping[tuple[Family, str], str] = field(default_factory=dict)
    definitions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def rewrite(self, text: str, family: Family) -> str:
        """A rule text in which the sets have the names of the configuration."""
        words = split(text)
        for index, word in enumerate(words[:-1]):
            if word == "--match-set":
                words[index + 1] = self.names.get((family, words[index + 1]), words[index + 1])
        return join(words)


def used(texts: Iterable[str]) -> list[str]:
    """The sets that these rules match, once each."""
    found: dict[str, None] = {}
    for text in texts:
        words = split(text)
        found.update((after, None) for word, after in pairwise(words) if word == "--match-set")
    return list(found)


def name_sets(wanted: Mapping[Family, Sequence[str]], kernel: Mapping[str, KernelSet] | None) -> Named:
    """What becomes of the sets that the rules of each family match; `kernel` None: nobody can look into them."""
    names: dict[tuple[Family, str], str] = {}
    definitions: dict[str, list[str]] = {}
    remarks: list[str] = []
    bases: dict[str, str] = {}
    for family, called in wanted.items():
        for name in called:
            remark = _refusal(name, kernel)
            if remark or kernel is None:
                remarks.append(remark)
                continue
            given = _given(name, family, kernel)
            while bases.setdefault(given, _base(name, family)) != _base(name, family):
                given = f"{given[: _NAME_MAX - 1]}{len(bases) % 10}"
            if name != kernel_set_name(given, family):
                remarks.append(f"set {name}: its content goes to the new set {given}, which nodewalld can keep")
            names[family, name] = given
            definitions.setdefault(given, []).extend(kernel[name].entries)
    return Named(names, definitions, tuple(dict.fromkeys(remarks)))


def _refusal(name: str, kernel: Mapping[str, KernelSet] | None) -> str:
    if name.startswith(RESERVED_SETS):
        return f"set {name} belongs to another program, which must have made it before nodewalld writes the rule"
    if kernel is None:
        return (
            f"set {name} must be defined, as [set.NAME] or by whoever makes it: `ipset list {name}` shows its content"
        )
    if name not in kernel:
        return f"set {name} is not in the kernel: define it as [set.NAME]"
    found = kernel[name]
    if found.type_name not in {"hash:net", "hash:ip"}:
        return f"set {name} is of type {found.type_name}, which nodewalld does not make: see that it is there at boot"
    if any(" " in entry for entry in found.entries):
        return f"set {name} has exceptions (nomatch), which nodewalld does not make: see that it is there at boot"
    return ""


def _given(name: str, family: Family, kernel: Mapping[str, KernelSet]) -> str:
    """The name in the configuration: the kernel's own where nodewalld can take the set over, else a new one."""
    base = _base(name, family)
    halves = {f: kernel.get(kernel_set_name(base, f)) for f in Family}
    kept = all(half is None or (half.type_name == "hash:net" and half.family is f) for f, half in halves.items())
    if kept and is_name(base) and name == kernel_set_name(base, family):
        return base
    letters = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in base)
    return f"{letters[: _NAME_MAX - 3]}_nw"


def _base(name: str, family: Family) -> str:
    return name.removesuffix("-v6") if family is Family.IPV6 else name
