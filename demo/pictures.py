"""`make pictures`: what nodewallctl answers, as pictures for the README, from real runs in a throw-away node.

Law: nothing is drawn that was not printed. A picture is one line in `SHOTS`: what is typed, and what happens before.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from lab.installed import Installed
from lab.node import Node

_ROOT = Path(__file__).resolve().parent.parent
_FOLDER = _ROOT / "docs/pictures"
_RULES = _ROOT / "tests/captures/kp126-nft-3svc"

CONFIG = """\
[set.office]
entries = ["10.90.0.7", "fd90::/64"]

[[port]]
name  = "vault"
ports = [31002, "32000-32010"]
allow = ["@office"]

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"
"""


class Shot(NamedTuple):
    """What is typed, and the shell commands that set the scene; for one that is not `guarded` the daemon is stopped."""

    name: str
    line: str
    before: tuple[str, ...] = ()
    guarded: bool = True


SHOTS = (
    Shot("status", "nodewallctl status", ("./cleanup", "./vpn-up", "nodewallctl set add office 10.90.0.9 --for 1h")),
    Shot("history", "nodewallctl history -n 8"),
    Shot("explain", 'nodewallctl explain tcp 203.0.113.7 "->" :31002 --in eth0'),
    Shot(
        "trace", "nodewallctl trace tcp --dport 31002 --from 203.0.113.7 --count 1", ("./stranger > /dev/null 2>&1 &",)
    ),
    Shot(
        "plan",
        "nodewallctl plan ./nodewalld",
        (
            'sed -i \'s/\\["@office"\\]/["@office", "198.51.100.0\\/24"]/\' nodewalld/nodewalld.toml',
            "iptables -t mangle -I PREROUTING -i tun0 -j ACCEPT",
        ),
        guarded=False,
    ),
)

_SCRIPTS = {
    "cleanup": "iptables -t mangle -F",
    # Until somebody looks, for a while.
    "stranger": f"""for attempt in $(seq 30); do
ip netns exec client {Node.python()} -c 'import socket
socket.create_connection(("10.90.0.1", 31002), 1, ("203.0.113.7", 0))'
done""",
    "vpn-up": "iptables -t mangle -I PREROUTING -i tun0 -j ACCEPT\niptables -I FORWARD -i tun0 -j ACCEPT",
}


def main(names: list[str]) -> int:
    """Take the pictures of these names, or all; the scenes are set in their order all the same."""
    _FOLDER.mkdir(exist_ok=True)
    with Node("nft") as node:
        node.load(_RULES)
        installed = Installed(node, CONFIG)
        for name, text in _SCRIPTS.items():
            installed.run(f"cat > {name} <<'END'\n#!/bin/sh\n{text}\nsleep 0.3\nEND\nchmod +x {name}")
        installed.start()
        for shot in SHOTS:
            if not shot.guarded:
                installed.stop()
            for command in shot.before:
                installed.run(command)
            printed = installed.typed(shot.line)
            if not names or shot.name in names:
                path = _FOLDER / f"{shot.name}.png"
                _draw(f"# {shot.line}\n{printed}").save(path, optimize=True)
                print(f"{path.relative_to(_ROOT)}: {path.stat().st_size // 1024} KiB")
    return 0


# --- drawing ----------------------------------------------------------------------------------------------------

_FONTS = Path("/usr/share/fonts/truetype/dejavu")
_SIZE, _LINE, _MARGIN = 20, 26, 24
_GROUND, _PLAIN = "#16191f", "#d7dae0"
_COLOURS = {"31": "#ff6b6b", "32": "#7bd88f", "33": "#f2c94c", "2": "#858b98"}
_BOLD = "1"


def _draw(text: str) -> Image.Image:
    """A terminal's text as a picture of few colours, which keeps it small."""
    plain, bold = (ImageFont.truetype(_FONTS / f"DejaVuSansMono{kind}.ttf", _SIZE) for kind in ("", "-Bold"))
    lines = text.rstrip("\n").split("\n")
    wide = max(80, *(len("".join(words for words, _ in _spans(line))) for line in lines))
    column = plain.getlength("M")
    size = (round(wide * column) + 2 * _MARGIN, len(lines) * _LINE + 2 * _MARGIN)
    picture = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        at = 0
        for words, style in _spans(line):
            font = bold if style == _BOLD else plain
            place = (_MARGIN + at * column, _MARGIN + number * _LINE)
            pen.text(place, words, font=font, fill=_COLOURS.get(style, _PLAIN))
            at += len(words)
    return picture.quantize(64, Image.Quantize.MAXCOVERAGE)


def _spans(line: str) -> Iterator[tuple[str, str]]:
    """The pieces of a line, each with the number of its colour or style ("" for none)."""
    style = ""
    for part in re.split(r"(\x1b\[\d*m)", line):
        if part.startswith("\x1b"):
            style = part[2:-1].removeprefix("0")
        elif part:
            yield part, style


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
