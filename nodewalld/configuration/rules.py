"""What a `[[rule]]` may say: one rule, no command, nothing that belongs to others.

Law: only what would change the meaning of the restore script, or start a quarrel with another program, is
judged here; whether iptables takes the matches and targets, iptables itself says in a trial namespace.
"""

import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_network

from nodewalld.configuration.reading import FieldError, Reading, takes
from nodewalld.configuration.tree import Node, show
from nodewalld.configuration.values import LINE, RESERVED, text
from nodewalld.core.ruletext import TAG_PREFIX, split
from nodewalld.core.words import Family

FOREIGN_JUMPS = ("cali-", "felix-")
"""Felix deletes every rule that jumps to such a chain and is not its own."""

_COMMANDS = {
    "A": "append",
    "C": "check",
    "D": "delete",
    "E": "rename-chain",
    "F": "flush",
    "I": "insert",
    "L": "list",
    "M": "modprobe",
    "N": "new-chain",
    "P": "policy",
    "R": "replace",
    "S": "list-rules",
    "V": "version",
    "X": "delete-chain",
    "Z": "zero",
    "h": "help",
    "t": "table",
    "w": "wait",
}
_SHORT_MATCH_OPTIONS = (
    "pol",
    "new",
)  # whole options of policy and CLUSTERIP, not --policy and --new-chain cut short
_FLAGS = "46fnvx"  # short options without an argument: others may follow in the same word
_JUMPS = {"-j": "--jump", "-g": "--goto"}
_COMMENT = "--comment"
_FREE_TEXT = frozenset(
    {_COMMENT, "--string", "--hex-string", "--log-prefix", "--nflog-prefix", "--name", "--path", "--bytecode"}
)
"""Options whose argument may look like anything, even like a command."""

_ADDRESS_PORT = re.compile(r"\[(?P<v6>[^\]]*)\](?::.*)?|(?P<v4>[0-9]+(?:\.[0-9]+){3}):.*")


@takes(LINE)
def rule_text(node: Node, reading: Reading) -> str:
    """The text of one rule, as iptables takes it after `-A CHAIN`."""
    written = text(node, reading)
    try:
        words = split(written)
    except ValueError as error:
        raise FieldError(node, str(error), "close the quotes") from None
    if not words:
        raise FieldError(node, "is empty", '"-p tcp --dport 22 -j ACCEPT"')
    for word, _ in _options(words):
        _refuse_command(node, word)
    for target in _arguments(words, _JUMPS):
        refuse_target(node, target, FOREIGN_JUMPS)
    for comment in _arguments(words, {_COMMENT: _COMMENT}):
        _refuse_comment(node, comment)
    return written


def refuse_target(node: Node, target: str, foreign: tuple[str, ...]) -> None:
    """Refuse a jump to a chain with another owner."""
    if target.startswith(foreign):
        raise FieldError(node, f"jumps to {show(target)}, which is another program's own", "a chain of your own")
    if target.startswith(RESERVED):
        raise FieldError(node, f"jumps to {show(target)}, a name that nodewalld keeps for itself", "another chain")


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word that iptables may take for an option, with the word after it."""
    free = False
    for word, after in zip(words, (*words[1:], ""), strict=True):
        if not free:
            yield word, after
        free = not free and word in _FREE_TEXT


def _refuse_command(node: Node, word: str) -> None:
    command = _command(word)
    if command == "table":
        raise FieldError(node, f"{show(word)} names a table", 'the key table, such as table = "mangle"')
    if command:
        cure = "only what follows -A CHAIN; the keys chain and position say where"
        raise FieldError(node, f"{show(word)} is a command, not part of a rule", cure)


def _command(word: str) -> str:
    """The command that getopt_long would take from this word, which may be glued or cut short."""
    if word.startswith("--"):
        option = word.partition("=")[0][2:]
        if not option or option in _SHORT_MATCH_OPTIONS:
            return ""
        return next((name for name in _COMMANDS.values() if name.startswith(option)), "")
    return _COMMANDS.get(word[1:].lstrip(_FLAGS)[:1], "") if word.startswith("-") else ""


def _refuse_comment(node: Node, comment: str) -> None:
    if comment.startswith("cali:"):
        raise FieldError(node, f"the comment {show(comment)} is Calico's, which deletes such rules", "another comment")
    if comment.startswith(TAG_PREFIX):
        raise FieldError(node, f"the comment {show(comment)} is nodewalld's own tag", "another comment")


def _arguments(words: Sequence[str], options: dict[str, str]) -> Iterator[str]:
    """The arguments of these options, apart, glued (`-jDROP`), with "=" or with the option cut short."""
    for word, after in _options(words):
        for short, long in options.items():
            option, equals, argument = word.partition("=")
            if word == short or (len(option) > len("--") and long.startswith(option)):
                yield argument if equals else after
            elif not short.startswith("--") and word.startswith(short):
                yield word.removeprefix(short)


def literal_families(rule: str) -> frozenset[Family]:
    """The families of the addresses that a rule's words spell out."""
    words = (word for word, _ in _options(split(rule)))
    return frozenset(family for word in words for part in re.split("[,=-]", word) for family in _family_of(part))


def _family_of(word: str) -> Iterator[Family]:
    match = _ADDRESS_PORT.fullmatch(word)
    try:
        network = ip_network((match["v6"] or match["v4"]) if match else word, strict=False)
    except (ValueError, TypeError):
        return
    yield Family.IPV4 if network.version == 4 else Family.IPV6
