"""What the demo prints: scenes, commands, marks and tables, 80 columns wide.

Law: colour adds nothing that the words and the marks don't say.
"""

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

WIDTH = 80
INDENT = "   "
BLOCK_WIDTH = WIDTH - len(INDENT) - len("│ ")
"""Columns for what a command prints."""
_READING_TIME = 0.7  # seconds before a scene begins, where somebody watches

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}


def wants_colour(stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    """Whether to paint: on a terminal whose user has not said no (https://no-color.org)."""
    return stream.isatty() and not env.get("NO_COLOR") and env.get("TERM") != "dumb"


def wrapped(text: str, *, first: str = "", rest: str = "", width: int = WIDTH) -> str:
    """The text in lines of at most `width` columns; options and addresses are never broken."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


class Page:
    """Where the story is told. `calm` leaves a moment for reading before each scene."""

    def __init__(self, stream: TextIO = sys.stdout, *, colour: bool = False, calm: bool = False) -> None:
        self._stream = stream
        self._colour = colour
        self._calm = calm
        self._scenes = 0

    def paint(self, text: str, *colours: str) -> str:
        """The text in these colours."""
        codes = ";".join(_COLOURS[colour] for colour in colours)
        return f"\x1b[{codes}m{text}\x1b[0m" if self._colour and codes else text

    def line(self, text: str = "") -> None:
        """Print one line, at once."""
        print(text, file=self._stream, flush=True)

    def title(self, text: str) -> None:
        """The first line."""
        self.line(self.paint(text, "bold"))

    def scene(self, title: str) -> None:
        """Begin a numbered scene."""
        if self._calm and self._scenes:
            time.sleep(_READING_TIME)
        self._scenes += 1
        self.line()
        self.line(f"{self.paint(f'{self._scenes:2}', 'cyan', 'bold')} {self.paint(title, 'bold')}")

    def say(self, text: str) -> None:
        """Tell something."""
        self.line(wrapped(text, first=INDENT, rest=INDENT))

    def command(self, text: str, *, note: str = "", prompt: str = "#") -> None:
        """Show a command that is run."""
        remark = f"   {self.paint(note, 'dim')}" if note else ""
        self.line(f"{INDENT}{self.paint(prompt, 'dim')} {self.paint(text, 'yellow')}{remark}")

    def good(self, text: str) -> None:
        """Something is as it should be."""
        self._marked(self.paint("✓", "green", "bold"), text)

    def bad(self, text: str) -> None:
        """Something is as it should not be."""
        self._marked(self.paint("✗", "red", "bold"), text)

    def _marked(self, mark: str, text: str) -> None:
        body = wrapped(text, first=INDENT + "  ", rest=INDENT + "  ")
        self.line(f"{INDENT}{mark} {body[len(INDENT) + 2 :]}")

    def detail(self, label: str, text: str, colour: str = "") -> None:
        """One labelled fact below a mark."""
        blank = INDENT + " " * 11
        body = wrapped(text, first=blank, rest=blank)[len(blank) :]
        lines = [self.paint(each, colour) if colour else each for each in body.split("\n")]
        self.line(f"{INDENT}  {self.paint(f'{label:8}', 'dim')} " + "\n".join(lines))

    def block(self, lines: Iterable[str]) -> None:
        """A file, or what a command printed."""
        width = BLOCK_WIDTH
        for each in lines:
            hanging = " " * (len(each) - len(each.lstrip()) + 4)
            for part in wrapped(each, rest=hanging, width=width).split("\n") if len(each) > width else [each]:
                self.line(f"{INDENT}{self.paint('│', 'dim')} {part}".rstrip())

    def picture(self, lines: Iterable[str]) -> None:
        """A drawing."""
        for each in lines:
            self.line(f"{INDENT}{self.paint(each, 'dim')}")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]], *, right: int) -> None:
        """Columns as wide as they need; the last `right` of them lean to the right."""
        content = [tuple(row) for row in rows]
        widths = [max(len(row[i]) for row in (head, *content)) for i in range(len(head))]

        def joined(row: Sequence[str]) -> str:
            left = len(row) - right
            cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            return INDENT + "  ".join(cells).rstrip()

        self.line(self.paint(joined(head), "dim"))
        for row in content:
            self.line(joined(row))
