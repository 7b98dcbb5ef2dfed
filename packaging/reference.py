"""What the programs themselves tell: shell completions, the commands' part of the man pages, the keys of the
configuration. Run by itself, it writes docs/nodewalld.schema.json and the tables of keys in docs/configuration.md.

Law: nothing is told twice. An option or a command that is added to a parser appears here by itself.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import shtab

from nodewalld.commands import ctl, daemon
from nodewalld.configuration.describe import json_schema
from nodewalld.configuration.reading import Key
from nodewalld.configuration.schema import SECTIONS

_DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMA, CONFIGURATION = _DOCS / "nodewalld.schema.json", _DOCS / "configuration.md"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each program."""
    return {"nodewalld": daemon.parser(), "nodewallctl": ctl._parser()}


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """What makes a shell ("bash" or "zsh") complete a program's words, and folders where it wants one."""
    _complete_folders(parser)
    return str(shtab.complete(parser, shell))


def _complete_folders(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    for _, _, inner in commands(parser):
        _complete_folders(inner)


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, summary and parser of each command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield name, summaries.get(name, ""), inner


def options_section(parser: argparse.ArgumentParser, without: frozenset[str] = frozenset()) -> str:
    """Options as a definition list of go-md2man's Markdown."""
    return "\n".join(f"{_shown(action)}\n: {_sentence(action)}\n" for action in _options(parser, without))


def commands_section(parser: argparse.ArgumentParser) -> str:
    """A heading for each command, with its synopsis, text, own options and examples."""
    shared = frozenset(name for action in parser._actions for name in action.option_strings)
    return "\n".join(_sections(parser, "", shared))


def _sections(parser: argparse.ArgumentParser, prefix: str, shared: frozenset[str]) -> Iterator[str]:
    for name, _, inner in commands(parser):
        words = [f"**{prefix}{name}**", *(_bracketed(action) for action in _options(inner, shared))]
        examples = [line for line in (inner.epilog or "").splitlines() if line.startswith("  ")]
        text = [f"## {' '.join(words)}", inner.description or "", "", options_section(inner, shared)]
        yield "\n".join([*text, "Examples:", "", "```", *(line.strip() for line in examples), "```", ""])
        yield from _sections(inner, f"{name} ", shared)


def _options(parser: argparse.ArgumentParser, without: frozenset[str]) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction) and not without.intersection(action.option_strings):
            yield action


def _bracketed(action: argparse.Action) -> str:
    needed = action.required and action.nargs != "?"
    return _shown(action) if needed else f"[{_shown(action)}]"


def _shown(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f"*{action.metavar or action.dest}*" + "..." * (action.nargs == "+")
    return ", ".join(f"**{name}** {value}".rstrip() for name in action.option_strings) or value


def _sentence(action: argparse.Action) -> str:
    text = (action.help or "") % vars(action)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def schema_text() -> str:
    """The text of docs/nodewalld.schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"


def configuration_text(text: str) -> str:
    """docs/configuration.md with the table of keys in each section as the program has it."""
    for name, section in SECTIONS.items():
        above = re.escape(f"## `{heading(name)}`\n")
        rows = "".join(f"| `{key}` | {_default(one)} | {one.meaning} |\n" for key, one in section.keys.items())
        table = f"| key | default | meaning |\n|---|---|---|\n{rows}"
        found = re.compile(rf"({above}(?:(?!\n## ).)*?\n)\| key \|.*?\n(?=\n)", re.DOTALL)
        if match := found.search(text):
            text = text[: match.start()] + match[1] + table + text[match.end() :]
    return text


def heading(name: str) -> str:
    """How a kind of table stands in a file: [daemon], [set.NAME], [[port]]."""
    return SECTIONS[name].shape.value.format(name)


def _default(key: Key) -> str:
    if key.example:
        return "required"
    return f"`{json.dumps(key.default)}`" if key.has_default else ""


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
    CONFIGURATION.write_text(configuration_text(CONFIGURATION.read_text()))
