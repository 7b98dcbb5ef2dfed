"""`nodewallctl trace`: real packets pass real rules, and each one's path is told as soon as it has ended.

Law: people get 80 columns, in which rule texts are wrapped and never cut; programs get one packet a line.
"""

import argparse
import os
import select
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from nodewalld.commands import render
from nodewalld.commands.common import GOOD, USAGE, Failure, Tools, complain, print_json, reading
from nodewalld.core.events import printable
from nodewalld.core.tracing.path import Kind, Path, Paths
from nodewalld.core.tracing.story import Step, Story, tell
from nodewalld.core.tracing.traffic import RATE, Traffic

if TYPE_CHECKING:
    from nodewalld.kernel.trace import Trace

_DEFAULT, _DEFAULT_WITH_COUNT = 10.0, 600.0
_WIDTH = 80
_FAMILIES = {"ipv4": "IPv4", "ipv6": "IPv6"}
_WORDS = {Kind.RULE: "(a rule that is no longer there)", Kind.RETURN: "(the end of the chain)"}


def run(args: argparse.Namespace, _tools: Tools) -> int:
    """Follow packets until the time is over, enough have come, or Ctrl-C."""
    from nodewalld.kernel.legacylog import Taken  # noqa: PLC0415 - heavy
    from nodewalld.kernel.trace import NoRules, Trace  # noqa: PLC0415
    from nodewalld.kernel.tracerule import TraceRuleError  # noqa: PLC0415

    traffic = _traffic(args)
    seconds = args.seconds or (_DEFAULT_WITH_COUNT if args.count else _DEFAULT)
    if os.geteuid() != 0:
        raise Failure("trace needs root")
    try:
        with reading("trace"), Trace(traffic, seconds) as trace:
            complain([f"note: {trace.missed}"] if trace.missed else [])
            seen = _show(trace, traffic, seconds, args)
            complain(["note: the kernel told more than could be read: steps are missing"] if trace.lost else [])
    except (TraceRuleError, Taken) as error:
        raise Failure(str(error)) from error
    except NoRules as error:
        raise Failure("this node has no rules in any backend, so there is no path to show") from error
    complain([f"{render.count(seen, 'packet')} followed." if seen else "No such packet was seen."])
    return GOOD


def _traffic(args: argparse.Namespace) -> Traffic:
    if args.dport and args.protocol == "icmp":
        raise Failure("--dport is for tcp, udp and sctp: icmp has no ports", status=USAGE)
    if args.from_node and args.interface:
        raise Failure("--in is for packets that come in: leave out --from-node, or --in", status=USAGE)
    traffic = Traffic(args.protocol, args.dport, args.source, args.destination, args.interface or "", args.from_node)
    if not traffic.families:
        raise Failure("--from and --to are of different families: no packet has both", status=USAGE)
    return traffic


def _show(trace: "Trace", traffic: Traffic, seconds: float, args: argparse.Namespace) -> int:
    """Print each packet when its path has ended; returns how many."""
    from nodewalld.kernel.ruletexts import RuleTexts  # noqa: PLC0415 - heavy

    texts, seen = RuleTexts(), 0
    paint = render.Paint(sys.stdout)
    try:
        texts.prepare(trace.legacy)
        complain(_wrapped(_announcement(traffic, seconds, args.count), "", ""))
        for path in _follow(trace, Paths(traffic.hook, trace.start), seconds):
            seen += 1
            story = tell(path, texts.look(sighting.spot for sighting in path.sightings))
            began = datetime.now(UTC) - timedelta(seconds=time.monotonic() - path.began)
            if args.json:
                print_json(_json(story, began))
            else:
                print("\n".join(_lines(story, began, paint)))
            sys.stdout.flush()
            if seen == args.count:
                break
    except KeyboardInterrupt:  # while something was printed
        pass
    finally:
        texts.close()
    return seen


def _follow(trace: "Trace", paths: Paths, seconds: float) -> Iterator[Path]:
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        try:
            select.select(trace.filenos(), [], [], max(0.0, min(end, paths.due) - now))
        except KeyboardInterrupt:  # the user has seen enough; what is under way is still told
            end = now
        heard = time.monotonic()
        for sighting in trace.read():
            paths.add(sighting, heard)
        yield from paths.done(time.monotonic())
    yield from paths.done(end, all_of_them=True)


def _announcement(traffic: Traffic, seconds: float, count: int | None) -> str:
    which = [traffic.protocol, "packets"]
    if traffic.ports:
        which.append("to port " + "-".join(map(str, dict.fromkeys(traffic.ports))))
    ends = (("from", traffic.source), ("to", traffic.destination))
    which += [f"{word} {str(end).removesuffix(f'/{end.max_prefixlen}')}" for word, end in ends if end]
    which.append("that this node sends" if traffic.from_node else f"that come in {traffic.interface}".rstrip())
    until = f"{seconds:g}s or {render.count(count, 'packet')}" if count else f"{seconds:g}s"
    return f"Following {' '.join(which)}, for {until}, {RATE} a second at most. Ctrl-C ends it."


# What is shown


def _lines(story: Story, began: datetime, paint: render.Paint) -> Iterator[str]:
    """A packet for people, in 80 columns; rule texts are wrapped, never cut."""
    coming = f", in {story.coming}" if story.coming else ""
    head = f"{began.astimezone():%H:%M:%S.%f}"[:-3] + f" {_FAMILIES[story.family]} {story.packet.line}{coming}"
    yield from (paint(line, "bold") for line in _wrapped(head, "", "    "))
    place = ""
    mixed = len({step.backend for step in story.steps}) > 1
    for step in story.steps:
        if changed := _changed(step):
            yield from (paint(line, "yellow") for line in _wrapped(f"now {changed}", "  ", "      "))
        here = _place(step) + (f" ({step.backend})" if mixed else "")
        if here != place:
            yield f"  {here}"
        place = here
        yield from _wrapped(_text(step), "    ", "      ")
        if step.mark is not None:
            yield paint(f"  now mark {step.mark:#x}", "yellow")
    colour = {"drop": "red", "accept": "green"}.get(story.verdict, "yellow")
    yield from (paint(line, colour) for line in _wrapped(f"=> {story.outcome}", "  ", "     "))
    yield ""


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(printable(text), _WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _place(step: Step) -> str:
    others = f"{step.tables} " if step.tables not in ("ip", "ip6") else ""
    return printable(f"{others}{step.table} {step.chain}")


def _text(step: Step) -> str:
    if step.kind is Kind.POLICY:
        return f"policy {step.verdict or 'unknown'}"
    text = step.rule or _WORDS[step.kind]
    entry = f"[{step.entry}] " if step.entry else ""
    doubt = "" if step.sure or not step.rule else " (the table has changed since: perhaps another rule)"
    return f"{entry}{text}{doubt}"


def _changed(step: Step) -> str:
    parts = [step.packet.line] if step.packet else []
    parts += [f"in {step.coming}"] if step.coming else []
    parts += [f"out {step.going}"] if step.going else []
    return ", ".join(parts)


def _json(story: Story, began: datetime) -> dict[str, Any]:
    return {
        "time": began.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "family": story.family.value,
        **_packet(story),
        "in": story.coming,
        "steps": [_step(step) for step in story.steps],
        "verdict": story.verdict,
        "outcome": story.outcome,
    }


def _packet(owner: Story | Step) -> dict[str, Any]:
    packet = owner.packet
    if packet is None:
        return {}
    ends = zip(("source", "sport", "destination", "dport"), packet.ends, strict=True)
    return {"protocol": packet.protocol, **dict(ends), "detail": packet.detail}


def _step(step: Step) -> dict[str, Any]:
    return {
        "backend": step.backend.value,
        "tables": step.tables,
        "table": step.table,
        "chain": step.chain,
        "kind": step.kind.value,
        "number": step.number,
        "rule": step.rule,
        "entry": step.entry,
        "verdict": step.verdict,
        "sure": step.sure,
        "packet": _packet(step) or None,
        "in": step.coming,
        "out": step.going,
        "mark": step.mark,
    }
