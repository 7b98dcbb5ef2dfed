"""What can be told from the programs' own parsers: shell completions, and the commands' part of the man pages.

Law: nothing is told twice. An option or a command that is added to a parser appears here by itself.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from nodewalld.commands import ctl, daemon

_NO_ESCAPE = str.maketrans({"[": r"\[", "]": r"\]", ":": r"\:", "'": "'\\''"})


@dataclass(frozen=True, slots=True)
class Option:
    """One option, or (without names) one positional argument."""

    names: tuple[str, ...]
    value: str
    help: str

    @property
    def wants_folder(self) -> bool:
        """Whether a shell should offer folders for it."""
        return self.value == "DIR"


@dataclass(frozen=True, slots=True)
class Command:
    """A program, or one command of it."""

    name: str
    summary: str
    text: str
    examples: tuple[str, ...]
    options: tuple[Option, ...]
    commands: tuple["Command", ...] = ()


def _describe(name: str, parser: argparse.ArgumentParser, summary: str = "") -> Command:
    found: list[Option] = []
    commands: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands = [_describe(key, inner, summaries.get(key, "")) for key, inner in action.choices.items()]
            continue
        value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
        found.append(Option(tuple(action.option_strings), value, (action.help or "") % vars(action)))
    examples = tuple(line.strip() for line in (parser.epilog or "").splitlines() if line.startswith("  "))
    return Command(name, summary, parser.description or "", examples, tuple(found), tuple(commands))


def nodewalld() -> Command:
    """The daemon's command line."""
    return _describe("nodewalld", daemon.parser())


def nodewallctl() -> Command:
    """The tool's command line."""
    return _describe("nodewallctl", ctl._parser())


# --- man pages ----------------------------------------------------------------------------------------------


def _shown(option: Option) -> str:
    value = f" *{option.value}*" if option.value else ""
    return ", ".join(f"**{name}**{value}" for name in option.names) or f"*{option.value}*"


def options_section(options: tuple[Option, ...]) -> str:
    """Options as a definition list of go-md2man's Markdown."""
    return "\n".join(f"{_shown(option)}\n: {_sentence(option.help)}\n" for option in options)


def commands_section(program: Command) -> str:
    """A heading for each command, with its synopsis, text, own options and examples."""
    shared = {option.names for option in program.options}
    parts = []
    for command in program.commands:
        own = tuple(option for option in command.options if option.names not in shared)
        synopsis = " ".join([f"**{command.name}**", *(f"[{_shown(option)}]" for option in own)])
        examples = "".join(f"    {example}\n" for example in command.examples)
        parts.append(f"## {synopsis}\n{command.text}\n\n{options_section(own)}\n{examples}")
    return "\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


# --- completions --------------------------------------------------------------------------------------------


def bash(*programs: Command) -> str:
    """One file for all programs, in plain bash: it needs nothing of the bash-completion package."""
    functions = "\n".join(_bash_function(program) for program in programs)
    return f"# bash completion for nodewalld; written from the programs' own parsers\n\n{functions}"


def _bash_function(program: Command) -> str:
    name = program.name
    folders = "|".join(sorted({n for o in _all_options(program) if o.wants_folder for n in o.names}))
    words = " ".join(name for option in program.options for name in option.names)
    cases = "".join(f"            {c.name}) words='{_words(c)}' ;;\n" for c in program.commands)
    takes = "|".join(c.name for c in program.commands if any(o.wants_folder and not o.names for o in c.options))
    commands = " ".join(command.name for command in program.commands)
    find = f"""
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in
            {folders}) ((i++)) ;;
            -*) ;;
            *) command="${{COMP_WORDS[i]}}"; break ;;
        esac
    done
    case "$command" in
            '') words="$words {commands}" ;;
{cases}    esac"""
    positional = f"""
        case "$command" in
            {takes}) COMPREPLY=($(compgen -d -- "$current")); compopt -o filenames 2>/dev/null ;;
        esac"""
    return f"""_{name}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local words='{words}' command='' i
    case "$previous" in
        {folders}) COMPREPLY=($(compgen -d -- "$current")); compopt -o filenames 2>/dev/null; return ;;
    esac{find if commands else ""}
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [[ ${{#COMPREPLY[@]}} -eq 0 || -z "$current" && -n "$command" ]]; then{positional if takes else ""}
        return 0
    fi
}}
complete -F _{name} {name}
"""


def _all_options(program: Command) -> Iterator[Option]:
    yield from program.options
    for command in program.commands:
        yield from command.options


def _words(command: Command) -> str:
    return " ".join(name for option in command.options for name in option.names)


def zsh(*programs: Command) -> str:
    """One autoloaded function for all programs, with the help texts."""
    names = " ".join(program.name for program in programs)
    cases = "\n".join(f"    {program.name})\n{_zsh_case(program)}\n        ;;" for program in programs)
    return f"#compdef {names}\n# Written from the programs' own parsers.\n\ncase $service in\n{cases}\nesac\n"


def _zsh_case(program: Command) -> str:
    lines = [_zsh_argument(option) for option in program.options]
    if not program.commands:
        return f"        _arguments -s {' '.join(lines)}"
    commands = " ".join(f"'{c.name}:{c.summary.translate(_NO_ESCAPE)}'" for c in program.commands)
    inner = "\n".join(
        f"            {c.name}) _arguments -s {' '.join(_zsh_argument(option) for option in c.options)} ;;"
        for c in program.commands
    )
    return f"""        local curcontext="$curcontext" state line
        local -a commands=({commands})
        _arguments -C -s {" ".join(lines)} '1:command:->command' '*::argument:->argument'
        case $state in
        command) _describe command commands ;;
        argument)
            case $line[1] in
{inner}
            esac
            ;;
        esac"""


def _zsh_argument(option: Option) -> str:
    action = "_files -/" if option.wants_folder else ""
    value = f":{option.value.lower()}:{action}" if option.value else ""
    if not option.names:
        return f"'::{value[1:]}'"
    text = option.help.translate(_NO_ESCAPE)
    if len(option.names) == 1:
        return f"'{option.names[0]}[{text}]{value}'"
    return f"'({' '.join(option.names)})'{{{','.join(option.names)}}}'[{text}]{value}'"
