"""`nodewallctl check`: is a configuration good, and can all of it do what it seems to?

Law: works without root and changes nothing. Errors are what can't be enforced, warnings what can't be meant; `--strict`
makes errors of warnings, but not of notes, which no configuration can cure. What could not be tried or read is said.
"""

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodewalld.commands import render, steer
from nodewalld.commands.common import FAILED, GOOD, USAGE, Failure, Tools, complain, print_json

if TYPE_CHECKING:
    from nodewalld.core.config import Config, Problem


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found, what could not be found out and why, and, of a configuration that could be read, its content."""

    errors: "tuple[Problem, ...]"
    warnings: "tuple[Problem, ...]" = ()
    untried: str | None = None
    unread: str | None = None
    content: str = ""


def check(args: argparse.Namespace, tools: Tools) -> int:
    """Judge a configuration folder."""
    from nodewalld.core import lints  # noqa: PLC0415 - heavy

    folder: Path = args.directory or args.config
    known = lints.CODES - lints.ERRORS
    for code in args.ignore:
        if code not in known:
            words = f"--ignore {code}: there is no such warning (one of {', '.join(sorted(known))})"
            raise Failure(words, status=USAGE)
    verdict = _judge(folder, tools, args.ignore, strict=args.strict)
    if args.json:
        print_json(_json(verdict))
        return FAILED if verdict.errors else GOOD
    notes = (f"{'note' if one.code in lints.NOTES else 'warning'}: {one}" for one in verdict.warnings)
    complain([*map(str, verdict.errors), *notes])
    if verdict.content and verdict.untried is not None:
        complain([f"could not try the rule texts: {verdict.untried}"])
    if verdict.content and verdict.unread is not None:
        complain([f"could not read all of this node, and judged without: {verdict.unread}"])
    if verdict.errors:
        complain([f"{folder}: {render.count(len(verdict.errors), 'error')}"])
        return FAILED
    print(f"{folder}: good: {verdict.content}")
    return GOOD


def _judge(folder: Path, tools: Tools, ignored: Collection[str], *, strict: bool) -> _Verdict:
    from nodewalld.configuration.errors import ConfigError  # noqa: PLC0415
    from nodewalld.core import lints  # noqa: PLC0415

    try:
        config = tools.load()(folder)
    except ConfigError as error:
        why = "the configuration has errors"
        return _Verdict(error.problems, untried=why, unread=why)
    except OSError as error:
        raise Failure(f"{folder} can't be read: {error.strerror or error}") from error
    offline = tools.offline()
    outcome = offline.try_texts(config)
    facts = offline.survey(config, steer.connection())
    refused, untried = ((), outcome) if isinstance(outcome, str) else (outcome, None)
    errors: list[Problem] = list(refused)
    warnings: list[Problem] = []
    for problem in lints.lint(config, facts, ignored):
        fatal = problem.code in lints.ERRORS or (strict and problem.code not in lints.NOTES)
        (errors if fatal else warnings).append(problem)
    return _Verdict(tuple(errors), tuple(warnings), untried, "; ".join(facts.unread) or None, _content(config))


def _json(verdict: _Verdict) -> dict[str, Any]:
    return {
        "errors": [_problem(one) for one in verdict.errors],
        "warnings": [_problem(one) for one in verdict.warnings],
        "tried": verdict.untried is None,
        "untried_reason": verdict.untried,
        "node_read": verdict.unread is None,
        "node_unread_reason": verdict.unread,
    }


def _content(config: "Config") -> str:
    kinds = (
        (config.zones, "zone"),
        (config.ports, "port"),
        (config.forwards, "forward"),
        (config.rules, "rule"),
        (config.jumps, "jump"),
        (config.sets, "set"),
    )
    parts = [render.count(len(entries), noun) for entries, noun in kinds if entries]
    return ", ".join(parts) or "no entries, nothing will be enforced"


def _problem(problem: "Problem") -> dict[str, Any]:
    where = {"file": problem.where.file, "line": problem.where.line}
    return {**where, "key": problem.key, "message": problem.message, "cure": problem.cure, "code": problem.code}
