"""Rule text as iptables-save prints it and iptables-restore reads it: words, quotes, and nothing of its meaning.

Law: a foreign rule is looked at only as far as an anchor needs (its target, its comments, its words), and text
that was read is never written back. Quoting as in iptables' `add_param_to_argv` (iptables/xshared.c): blanks
separate, double quotes group, a backslash inside quotes takes the next character as it is.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from nodewalld.core.config import Anchor, AnchorKind

TAG_PREFIX = "nodewalld:"
"""A rule with a comment that starts so is ours."""

_JUMPS = ("-j", "--jump", "-g", "--goto")
_SPECIAL = frozenset(' \t"\\')


def split(text: str) -> list[str]:
    """The words of a rule text. Raises ValueError, with a sentence, on quotes that don't close."""
    words: list[str] = []
    word = ""
    started = quoted = escaped = False
    for char in text:
        if escaped:
            word, escaped = word + char, False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted, started = not quoted, True
        elif not quoted and char in " \t":
            if started:
                words.append(word)
            word, started = "", False
        else:
            word, started = word + char, True
    if quoted:
        raise ValueError('a double quote (") is opened and never closed')
    if started:
        words.append(word)
    return words


@lru_cache(maxsize=2048)
def words_of(text: str) -> tuple[str, ...]:
    """As `split`, remembered: the same few rules are looked at again and again."""
    return tuple(split(text))


@lru_cache(maxsize=2048)
def target_of(text: str) -> str:
    """The chain or target after -j or -g in a rule's text; "" for a rule that only counts."""
    return next((after for word, after in pairwise(words_of(text)) if word in _JUMPS), "")


def quote(word: str) -> str:
    """One word, quoted where iptables-restore needs it."""
    if word and not _SPECIAL & set(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def join(words: Sequence[str]) -> str:
    """The rule text of these words; `split` gives them back."""
    return " ".join(quote(word) for word in words)


@dataclass(frozen=True)
class Rule:
    """One rule as a tool printed it: what follows `-A CHAIN`."""

    text: str

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The text in words."""
        return words_of(self.text)

    @cached_property
    def target(self) -> str:
        """The chain or target after -j or -g; "" for a rule that only counts."""
        return target_of(self.text)

    @property
    def shown(self) -> str:
        """What to call it in a sentence: the chain that it leads to, else the whole rule."""
        return self.target if "-" in self.target else self.text

    @cached_property
    def returns(self) -> bool:
        """Whether it ends the chain that it is in: by RETURN or by goto."""
        return self.target == "RETURN" or "-g" in self.words

    @cached_property
    def comments(self) -> tuple[str, ...]:
        """Every comment of the rule."""
        return tuple(after for word, after in pairwise(self.words) if word == "--comment")

    @cached_property
    def tag(self) -> str:
        """Our word in the rule, without the prefix; "" for a foreign rule."""
        return next((c.removeprefix(TAG_PREFIX) for c in self.comments if c.startswith(TAG_PREFIX)), "")

    @cached_property
    def bare(self) -> tuple[str, ...]:
        """The words without comments: what two writings of one rule have in common."""
        return bare_words(self.words)

    def matches(self, anchor: Anchor) -> bool:
        """Whether this (foreign) rule is the one that an anchor means."""
        if anchor.kind is AnchorKind.TARGET:
            return bool(self.target) and fnmatch.fnmatchcase(self.target, anchor.pattern)
        if anchor.kind is AnchorKind.COMMENT:
            return any(fnmatch.fnmatchcase(comment, anchor.pattern) for comment in self.comments)
        return self.bare == bare_words(words_of(anchor.pattern))


def bare_words(words: Sequence[str]) -> tuple[str, ...]:
    """Words without `-m comment --comment TEXT` and without `-c PACKETS BYTES`."""
    kept: list[str] = []
    skip = 0
    for index, word in enumerate(words):
        if skip:
            skip -= 1
        elif word == "--comment" or (word == "-m" and index + 1 < len(words) and words[index + 1] == "comment"):
            skip = 1
        elif word == "-c":
            skip = 2
        else:
            kept.append(word)
    return tuple(kept)


def tag_words(tag: str) -> tuple[str, ...]:
    """The match that marks a rule as ours."""
    return ("-m", "comment", "--comment", TAG_PREFIX + tag)


def untagged(text: str) -> str:
    """A rule's text without the match that marks it as ours."""
    words = split(text)
    for index, word in enumerate(words):
        if words[index - 1 : index] == ["--comment"] and word.startswith(TAG_PREFIX):
            start = index - 3 if words[index - 3 : index - 1] == ["-m", "comment"] else index - 1
            return join(words[:start] + words[index + 1 :])
    return text
