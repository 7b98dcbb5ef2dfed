"""The story: a port that can't be shut, a rule that does not last, and a guard that holds it.

Law: a scene checks what it tells; NotAsToldError ends the story where the world does not agree.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo.knocking import RATE, Door, Event, Incident, NotAsToldError, Repairs, suffer
from demo.machine import own_rules, traces
from demo.page import BLOCK_WIDTH, Page
from lab.daemon import Daemon
from lab.layout import ALLOWED, NODE, POD1, POD2, STRANGER
from lab.node import BackendName, Node
from lab.traffic import Answer, connect, serve

NODE_PORT = 31002
KUBELET = 10250

CONFIGURATION = f"""\
[daemon]
resync = "2s"              # ipsets tell no events: look every 2 seconds

[set.office]
entries = ["{ALLOWED.ipv4}"]

[[port]]
name  = "office-only"
ports = [{NODE_PORT}, {KUBELET}]     # a NodePort, and the kubelet
allow = ["@office"]        # and nobody else
"""

_CAPTURE = Path(__file__).resolve().parent.parent / "tests" / "captures"
_TO_PODS = Door(NODE_PORT, ("pod1", "pod2"), 8080)
_TO_KUBELET = Door(KUBELET, ("node",), KUBELET)
_FAMILIES = {"ipv4": "IPv4", "ipv6": "IPv6"}


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Somebody who misbehaves: the name of the script, its lines, and what to call the deed."""

    name: str
    title: str
    deed: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chapter:
    """A disturbance that is over, for the table at the end."""

    neighbour: Neighbour
    incident: Incident


def _neighbours(backend: BackendName) -> dict[str, Neighbour]:
    by_hand = tuple(f"iptables -t {table} -F" for table in ("nat", "filter", "mangle"))
    everything = ("nft flush ruleset",) if backend == "nft" else by_hand
    members = (
        Neighbour("cleanup", "A cleanup script flushes mangle", "flushed mangle", ("iptables -t mangle -F",)),
        Neighbour(
            "vpn-up",
            "A VPN inserts an ACCEPT above ours",
            "ACCEPT above ours",
            ("iptables -t mangle -I PREROUTING -j ACCEPT",),
        ),
        Neighbour(
            "colleague",
            "A colleague deletes the rule that drops",
            "deleted our DROP",
            ("iptables -t mangle -F NODEWALL-x-office-only",),
        ),
        Neighbour(
            "restore",
            "Last night's backup is restored, whole tables",
            "restored whole tables",
            ("iptables-restore < /run/rules.v4",),
        ),
        Neighbour("inventory", "An inventory job empties the set", "flushed our set", ("ipset flush office",)),
        Neighbour("reset", "Somebody flushes everything", "flushed everything", everything),
    )
    return {member.name: member for member in members}


class Story:
    """Tells it once, in one throw-away node."""

    def __init__(self, page: Page, backend: BackendName) -> None:
        self.page = page
        self.backend: BackendName = backend
        self._neighbours = _neighbours(backend)
        self._chapters: list[Chapter] = []

    def tell(self) -> None:
        """All of it. Raises NotAsToldError and LabError."""
        started = time.monotonic()
        rules = own_rules()
        self.page.title(f"nodewalld holds firewall rules in position. Watch it, on {self.backend}.")
        with Node(self.backend) as node:
            self._build(node)
            self._obvious_rule(node)
            self._right_rule(node)
            with Daemon(node, CONFIGURATION, start=False) as daemon:
                self._guard(node, daemon)
                repairs = Repairs(daemon)
                self._misbehaviour(node, repairs)
                repairs.close()
                self._sum_up(daemon)
                evidence = traces(node)
        self.page.scene("Nothing is left")
        if left := evidence.left():
            raise NotAsToldError(f"The node is not gone: {', '.join(left)}")
        processes, networks = len(evidence.processes), evidence.networks
        self.page.good(f"the node is gone: {processes} processes, and with them {networks} network namespaces")
        now = own_rules()
        if changed := [source for source in rules | now if rules.get(source) != now.get(source)]:
            raise NotAsToldError(
                f"`{changed[0]}` of this machine shows something else than before. The demo writes only inside its "
                "own namespaces, so another program has written meanwhile; run it again to be sure"
            )
        self.page.good(f"this machine's own rules and sets are what they were (compared: {', '.join(rules)})")
        self.page.line()
        self.page.say(f"{time.monotonic() - started:.1f} seconds. How it works: docs/how-it-works.md")

    # The node, and what people do by hand

    def _build(self, node: Node) -> None:
        page = self.page
        page.scene("A node, as Kubernetes leaves it")
        page.picture(
            (
                f"stranger {STRANGER.ipv4:12} ──┐                          ┌── pod1 {POD1.ipv4}:8080",
                f"                        ├── node {NODE.ipv4}:{NODE_PORT} ──┤",
                f"office   {ALLOWED.ipv4:12} ──┘                          └── pod2 {POD2.ipv4}:8080",
            )
        )
        capture = _CAPTURE / f"kp126-{self.backend}-3svc.v4.save"
        node.run("cat > /run/rules.v4", stdin=capture.read_text())
        node.load(str(_CAPTURE / f"kp126-{self.backend}-3svc"))
        page.say(
            "All of it lives in network namespaces. Its rules are as kube-proxy 1.26 wrote them; they serve NodePort "
            f"{NODE_PORT} to the world:"
        )
        serve(node, "pod1", tcp=[8080])
        serve(node, "pod2", tcp=[8080])
        serve(node, "node", tcp=[KUBELET])
        self._shown(node, f"iptables -t nat -S KUBE-NODEPORTS | grep {NODE_PORT}")
        self._stranger_gets_in(node)

    def _obvious_rule(self, node: Node) -> None:
        page = self.page
        page.scene("The obvious rule does nothing")
        rule = f"INPUT -p tcp --dport {NODE_PORT} -j DROP"
        self._shown(node, f"iptables -I {rule}")
        self._stranger_gets_in(node)
        counted = node.run("iptables -nvxL INPUT 1").stdout.split()[0]
        if counted != "0":
            raise NotAsToldError(f"The rule in filter INPUT has seen {counted} packets, not none")
        page.say(
            f"The rule has seen {counted} packets. Long before filter, nat PREROUTING has rewritten the port to a "
            "pod's 8080; the packet is routed through FORWARD and never meets INPUT."
        )

    def _right_rule(self, node: Node) -> None:
        page = self.page
        page.scene("The right rule does not last")
        rule = f"PREROUTING -p tcp --dport {NODE_PORT} -j DROP"
        self._shown(node, f"iptables -t mangle -I {rule}")
        self._stranger_is_shut_out(node, "before nat can rewrite it")
        self._shown(node, "iptables-restore < /run/rules.v4", note="a backup, a reboot, an update ...")
        self._stranger_gets_in(node, "until somebody notices")

    def _guard(self, node: Node, daemon: Daemon) -> None:
        page = self.page
        page.scene("nodewalld, with ten lines")
        page.block(CONFIGURATION.splitlines())
        page.command("nodewalld")
        started = time.monotonic()
        daemon.start()
        ready = daemon.wait_ready().noticed("READY")[0].when
        page.good(f"{daemon.status_text}, {(ready - started) * 1000:.0f} ms after its start")
        self._as_configured(node)

    # The neighbours

    def _misbehaviour(self, node: Node, repairs: Repairs) -> None:
        page, by = self.page, self._neighbours
        page.line()
        page.say(
            f"Now the neighbours, one by one, while the stranger goes on knocking: {RATE:,} connection attempts a "
            "second, each counted where it would arrive."
        )
        incident = self._chapter(node, repairs, by["cleanup"])
        if not incident.slipped:
            page.say(
                "None slipped through: the same refusal stands in the shield, an nf_tables table that no iptables tool "
                "touches."
            )

        self._chapter(node, repairs, by["vpn-up"])
        page.say("The ACCEPT is not ours to delete; it stands below us now:")
        self._shown(node, "iptables -t mangle -S PREROUTING")
        targets = [rule.rpartition(" ")[2] for rule in node.chain("mangle", "PREROUTING")]
        if targets != ["NODEWALL-PREROUTING", "ACCEPT"]:
            raise NotAsToldError("Our jump does not stand above a foreign ACCEPT that was left alone")

        self._chapter(node, repairs, by["colleague"])
        self._chapter(node, repairs, by["restore"])
        self._set_chapter(node, repairs)

        self._chapter(node, repairs, by["reset"], door=_TO_KUBELET)
        page.say("kube-proxy's rules are gone as well, so the stranger knocked at the kubelet. kube-proxy comes back:")
        self._shown(node, "iptables-restore --noflush < /run/rules.v4")
        self._as_configured(node)

    def _chapter(self, node: Node, repairs: Repairs, neighbour: Neighbour, door: Door = _TO_PODS) -> Incident:
        script = self._enter(node, neighbour)
        incident = suffer(node, repairs, door, script)
        self._tell(neighbour, incident)
        answer = connect(node, "client", to=(NODE.ipv4, door.port), source=STRANGER.ipv4)
        if answer.open:
            raise NotAsToldError(f"The stranger gets in at port {door.port} after the repair")
        return incident

    def _set_chapter(self, node: Node, repairs: Repairs) -> None:
        neighbour = self._neighbours["inventory"]
        script = self._enter(node, neighbour)
        answers: list[Answer] = []

        def misbehave() -> None:
            script()
            answers.append(_office(node))

        incident = suffer(node, repairs, _TO_PODS, misbehave)
        if not answers[0].open:
            self.page.bad(f"office   {ALLOWED.ipv4}: shut out. An empty list lets nobody in: it fails closed")
        self._tell(neighbour, incident)
        self._as_configured(node)

    def _enter(self, node: Node, neighbour: Neighbour) -> Callable[[], object]:
        """Show what a neighbour will do, and return how to do it."""
        self.page.scene(neighbour.title)
        for line in neighbour.lines:
            self.page.command(line)
        script = f"/run/{neighbour.name}"
        text = "\n".join(("#!/bin/sh", *neighbour.lines, ""))
        node.run(f"cat > {script} && chmod +x {script}", stdin=text)
        return lambda: node.run([script])

    def _tell(self, neighbour: Neighbour, incident: Incident) -> None:
        page = self.page
        times = incident.exposed_by_family()
        if not incident.noticed:
            page.good(f"in force again at the next look, {_milliseconds(incident.again_ms)} later")
        elif len(times) == 1:
            page.good(f"in force again after {_milliseconds(incident.again_ms)}")
        else:
            each = (f"{_milliseconds(ms)} ({_FAMILIES[name]})" for name, ms in times.items())
            page.good(f"in force again after {' and '.join(each)}")
        page.detail("wrong", _wrong(incident))
        page.detail("by", "; ".join(incident.culprits()) or f"the kernel names nobody for {self._nameless(incident)}")
        if incident.slipped:
            within = f", within {_milliseconds(incident.open_ms)}" if incident.open_ms else ""
            page.detail("knocks", f"{incident.slipped} of {incident.knocks:,} slipped through{within}", "yellow")
        else:
            page.detail("knocks", f"0 of {incident.knocks:,} slipped through", "green")
        self._chapters.append(Chapter(neighbour, incident))

    def _nameless(self, incident: Incident) -> str:
        """What was written without the kernel telling who did."""
        rules = any(event["table"] for event in incident.repairs)
        return f"{self.backend} tables" if rules else "ipsets"

    # The end

    def _sum_up(self, daemon: Daemon) -> None:
        page = self.page
        page.scene("What it came to")
        rows = [
            (
                chapter.neighbour.name,
                chapter.neighbour.deed,
                _milliseconds(chapter.incident.again_ms),
                f"{chapter.incident.knocks:,}",
                f"{chapter.incident.slipped:,}",
            )
            for chapter in self._chapters
        ]
        knocks = sum(chapter.incident.knocks for chapter in self._chapters)
        slipped = sum(chapter.incident.slipped for chapter in self._chapters)
        rows.append(("together", "", "", f"{knocks:,}", f"{slipped:,}"))
        page.table(("NEIGHBOUR", "DEED", "AGAIN AFTER", "KNOCKS", "SLIPPED"), rows, right=3)
        page.line()
        self._nodewallctl(daemon, "status")
        self._nodewallctl(daemon, "plan")

    def _nodewallctl(self, daemon: Daemon, command: str) -> None:
        self.page.command(f"nodewallctl {command}")
        result = daemon.ctl(command, env={"COLUMNS": str(BLOCK_WIDTH)})
        self.page.block((result.stdout + result.stderr).splitlines())
        if result.returncode:
            raise NotAsToldError(f"nodewallctl {command} exits {result.returncode}, not 0")

    def _shown(self, node: Node, command: str, note: str = "") -> None:
        """Run a command for all to see."""
        self.page.command(command, note=note)
        self.page.block(node.run(command).stdout.splitlines())

    # Who gets in

    def _as_configured(self, node: Node) -> None:
        self._stranger_is_shut_out(node)
        answer = _office(node)
        if not answer.open:
            raise NotAsToldError(f"The office does not get in: {answer}")
        self.page.good(f"office   {ALLOWED.ipv4}: gets in, served by {answer.server}")

    def _stranger_gets_in(self, node: Node, remark: str = "") -> None:
        answer = _stranger(node)
        if not answer.open:
            raise NotAsToldError(f"The stranger does not get in: {answer}")
        end = f", {remark}" if remark else ""
        self.page.bad(f"stranger {STRANGER.ipv4}: gets in, served by {answer.server}{end}")

    def _stranger_is_shut_out(self, node: Node, remark: str = "") -> None:
        answer = _stranger(node)
        if answer.open:
            raise NotAsToldError(f"The stranger gets in: {answer}")
        end = f", {remark}" if remark else ""
        self.page.good(f"stranger {STRANGER.ipv4}: shut out{end}")


def _stranger(node: Node) -> Answer:
    return connect(node, "client", to=(NODE.ipv4, NODE_PORT), source=STRANGER.ipv4)


def _office(node: Node) -> Answer:
    return connect(node, "client", to=(NODE.ipv4, NODE_PORT), source=ALLOWED.ipv4)


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def _wrong(incident: Incident) -> str:
    """What nodewalld found, each thing once: what of ours it was, where, and what had become of it."""
    places: dict[tuple[str, str], list[str]] = {}
    for event in incident.repairs:
        what, place = _subject(event)
        chains = places.setdefault((what, str(event["reason"])), [])
        if place and place not in chains:
            chains.append(place)
    return "; ".join(f"{what}{_in_places(chains)}: {reason}" for (what, reason), chains in places.items())


def _subject(event: Event) -> tuple[str, str]:
    """What of ours was wrong, and in which foreign chain, if it was a jump."""
    subject = str(event["what"]).removeprefix("put right ").removeprefix("filled ").removesuffix(" again")
    return ("our jump", f"{event['table']} {event['chain']}") if subject.startswith("the jump") else (subject, "")


def _in_places(chains: list[str]) -> str:
    """The chains in words, their table once: " in mangle PREROUTING, INPUT and FORWARD"."""
    if not chains:
        return ""
    first, *more = chains
    table = first.split()[0]
    names = [first, *(name.removeprefix(f"{table} ") for name in more)]
    *most, last = names
    return f" in {', '.join(most)} and {last}" if most else f" in {last}"
