"""Where each key of a TOML text stands, which tomllib does not tell.

Law: of a text that tomllib accepts every key has its line; of another text whatever was found before its fault. This
scanner finds keys, tables and elements and steps over values; it decodes nothing but keys, and judges nothing but
what would take tomllib hours or gigabytes. Its patterns go back over no character that they have taken, only over whole
escapes and lines. Newlines, comments and trailing commas are stepped over in inline tables too, because TOML 1.1
(Python 3.15) has them there.

Possessive quantifiers stand behind single characters only: behind groups they are broken before Python 3.11.5
(gh-106052), and Debian 12 has 3.11.2.
"""

import contextlib
import re
import sys
import tomllib
from bisect import bisect_right

from nodewalld.configuration.errors import FileError

KeyPath = tuple[str | int, ...]
"""The keys from the root down to a value; an element of an array is named by its index, from 0."""

_PARTS_MAX = 100
_NUMBER_MAX = 4000  # int() refuses numbers of more than 4300 digits, and tomllib lets that through
_BASIC = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*"'
_LITERAL = r"'[^'\n]*+'"
_BLANK = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*")
_KEY_PART = re.compile(rf"{_BASIC}|{_LITERAL}|[A-Za-z0-9_-]++")
_DOT = re.compile(r"[ \t]*+\.[ \t]*+")
_STRING = re.compile(
    # It may end in one or two quotes of its own, before the closing three.
    rf"""\"{{3}}[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*"{{3,5}}|'{{3}}.*?'{{3,5}}|{_BASIC}|{_LITERAL}""",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^,\]}#\n]++")


def locate(text: str, most: int = sys.maxsize) -> dict[KeyPath, int]:
    """The line, from 1, of every table, key and array element; of one that is named often, the first.

    Raises FileError when these are more than `most`, or when a key or a number is longer than anybody writes it.
    """
    scanner = _Scanner(text, most)
    with contextlib.suppress(ValueError, IndexError):  # what is no TOML, tomllib tells
        scanner.scan()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str, most: int) -> None:
        self._text, self._most = text, most
        self._at = 0
        self._line_ends = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[KeyPath, int] = {}
        self._lengths: dict[KeyPath, int] = {}  # of the arrays of tables, which grow header by header

    def scan(self) -> None:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._take("[["):
                table = self._array_header()
            elif self._take("["):
                table = self._table_header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _table_header(self) -> KeyPath:
        line = self._line()
        path = self._descend((), self._keys(), line)
        self._take("]")
        return path

    def _array_header(self) -> KeyPath:
        line = self._line()
        *parents, last = self._keys()
        self._take("]]")
        array = (*self._descend((), parents, line), last)
        self._note(array, line)
        index = self._lengths.get(array, 0)
        self._lengths[array] = index + 1
        self._note((*array, index), line)
        return (*array, index)

    def _descend(self, path: KeyPath, keys: list[str], line: int) -> KeyPath:
        """Follow keys downwards; through an array of tables the way goes by its newest table."""
        for key in keys:
            path = (*path, key)
            self._note(path, line)
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
        return path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = self._descend(table, self._keys(), line)
        self._take("=")
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        if self._take("["):
            self._array(path)
        elif self._take("{"):
            self._inline_table(path)
        elif self._text[self._at] in "\"'":
            self._skip(_STRING)
        else:
            line, start = self._line(), self._at
            self._skip(_PLAIN)
            if len(self._text[start : self._at].strip()) > _NUMBER_MAX:
                raise FileError("holds a number that is too long", "a shorter number", line, "syntax")

    def _array(self, path: KeyPath) -> None:
        index = 0
        while not self._take("]"):
            element = (*path, index)
            self._note(element, self._line())
            self._value(element)
            self._take(",")
            index += 1

    def _inline_table(self, path: KeyPath) -> None:
        while not self._take("}"):
            self._pair(path)
            self._take(",")

    def _keys(self) -> list[str]:
        """A key with its dots, as its parts."""
        keys = [self._key_part()]
        while _DOT.match(self._text, self._at):
            self._skip(_DOT)
            keys.append(self._key_part())
            if len(keys) > _PARTS_MAX:
                raise FileError(f"has a key of more than {_PARTS_MAX} parts", "fewer dots", self._line(), "syntax")
        return keys

    def _key_part(self) -> str:
        start = self._at
        self._skip(_KEY_PART)
        part = self._text[start : self._at]
        return tomllib.loads(f"key = {part}")["key"] if part[:1] in "\"'" else part

    def _take(self, token: str) -> bool:
        """Step over a token, if it is there, and the blanks around it."""
        self._skip(_BLANK)
        found = self._text.startswith(token, self._at)
        if found:
            self._at += len(token)
            self._skip(_BLANK)
        return found

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        if not match:
            raise ValueError(f"not TOML at offset {self._at}")
        self._at = match.end()

    def _line(self) -> int:
        return bisect_right(self._line_ends, self._at) + 1

    def _note(self, path: KeyPath, line: int) -> None:
        self.lines.setdefault(path, line)
        if len(self.lines) > self._most:
            raise FileError("has more values than can be taken", "addresses in the `files` of a set", line, "syntax")
