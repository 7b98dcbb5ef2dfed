"""The one loop: sources of wake-ups -> the reconciler -> health.

Laws: passes run in this thread, straight from the event that asked for them; only the heart (systemd's watchdog) and
the control socket have threads of their own, and those read frozen values or leave a request in the queue. The loop
has the one broad catch of the program: what goes wrong in a pass is told, and the rules stay.
"""

import contextlib
import os
import selectors
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from nodewalld import __version__
from nodewalld.core.blame import Wake, contention_events
from nodewalld.core.events import ConfigStatus, Event, Kind, State, Status
from nodewalld.core.lockout import parse_connection
from nodewalld.core.summary import Summary
from nodewalld.core.words import Backend
from nodewalld.desk import Desk
from nodewalld.follower import Follower
from nodewalld.governor import Governor
from nodewalld.kernel.links import LinkEvents, Links
from nodewalld.kernel.lockwatch import LockWatch
from nodewalld.kernel.tracerule import sweep
from nodewalld.kernel.urgency import Urgency
from nodewalld.service.additions import AdditionStore
from nodewalld.service.control import ControlServer, Request
from nodewalld.service.heart import Heart
from nodewalld.service.history import History
from nodewalld.service.instance import Instance
from nodewalld.service.journal import announce
from nodewalld.service.metrics import Metrics, Snapshot
from nodewalld.service.notify import Notifier
from nodewalld.service.state import StateFolder
from nodewalld.service.tenure import LONGEST, Tenure
from nodewalld.service.wire import Refused
from nodewalld.setbook import SetBook
from nodewalld.shielded import ShieldedReconciler
from nodewalld.surroundings import Surroundings
from nodewalld.witness import Witness

LEGACY_LOOK = 1.0
"""Seconds between looks at the legacy tables, for writers that go round the xtables lock."""

_LOOK_REST = 50  # a table of 100,000 rules takes the kernel 0.2 s to show: such looks are rarer

_RETRY_FIRST, _RETRY_LAST = 1.0, 30.0
_SETTLE = 0.05  # links come and go in bursts; addresses follow within milliseconds

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a daemon reads, talks and remembers."""

    config: Path
    runtime: Path
    state: Path


@dataclass
class _Clockwork:
    """When what is due next (monotonic seconds)."""

    resync: float
    look: float = float("inf")
    retry: float = float("inf")
    relink: float = float("inf")
    pause: float = _RETRY_FIRST

    @property
    def next(self) -> float:
        return min(self.resync, self.look, self.retry, self.relink)


class Daemon:
    """One daemon: construct, then `run` until SIGTERM. Raises ConfigError at the start, while nothing is changed."""

    def __init__(self, folders: Folders, notifier: Notifier | None = None) -> None:
        self.folders = folders
        self._notifier = notifier or Notifier()
        self._heart = Heart(self._notifier.watchdog_interval, self._notifier.watchdog)
        self._history, self._summary, self._metrics = History(), Summary(), Metrics()
        self._links, self._link_events = Links(), LinkEvents()
        self._disk = state = StateFolder(folders.state)
        self._reconciler = ShieldedReconciler(
            environment=self._links.environment, state=state, runtime_dir=folders.runtime, record=self._record
        )
        self._book = SetBook(AdditionStore(state), Follower(self._wake_up))
        self._governor = Governor(folders.config, self._reconciler, Tenure(state), self._book, self._record)
        self._governor.choose()
        self._selector = selectors.DefaultSelector()
        self._desk = Desk(self._history, lambda: self.status, self._governor.list_sets, self._wake_up)
        self._witness = Witness(self._reconciler.take_own_ports)
        self._reconciler.overhear = self._witness.overhear
        self._surroundings = Surroundings(state, self._record, self._witness.take_strangers)
        self._urgency = Urgency()
        self._lock_watch: LockWatch | None = None
        self._lock_closed = 0.0
        self._signals: set[int] = set()
        self._bell, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._due = _Clockwork(resync=0.0)
        self._turned = time.monotonic()
        self._stopping = threading.Event()
        self._ready = self._failed = False
        self._since = datetime.now(UTC)
        self._told: tuple[State, tuple[str, ...]] = (State.STARTING, ())
        self.status = self._status()

    # Life

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; the exit status. Raises AlreadyRunning."""
        with Instance(self.folders.runtime) as instance, contextlib.ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(self._ring, warn_on_full_buffer=False))
            self._watch()
            stack.callback(self._unwatch)
            stack.callback(self._metrics.close)
            stack.enter_context(self._heart)
            stack.enter_context(ControlServer(instance, self._desk.handle))
            self._start()
            stack.enter_context(self._book)
            while not self._stopping.is_set():
                self._turn()
            self._notifier.stopping("Stopping; the rules stay in the kernel")
            self._record(_event(Kind.STOP, "stopped; the rules stay in the kernel"))
            for told in self._summary.flush(time.monotonic(), at_once=True):
                announce(told)
            self._desk.close()
        return 0

    def once(self) -> int:
        """Enforce, verify, and leave; 0 when everything is in force."""
        with Instance(self.folders.runtime):
            self._start()
        for reason in self._reasons():
            _log.error(reason)
        return 0 if self._reconciler.in_force else 1

    def _start(self) -> None:
        with self._heart.working():
            sweep()
            self._governor.start()
        self._surroundings.look(self._reconciler.backend)
        self._due.resync = time.monotonic() + self._governor.config.daemon.resync
        self._after_pass()
        self._record(_event(Kind.START, f"nodewalld {__version__} started: {self.status.sentence()}"))

    def _watch(self) -> None:
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._selector.register(self._link_events, selectors.EVENT_READ)
        self._witness.listen()
        if self._witness.events:
            self._selector.register(self._witness.events, selectors.EVENT_READ)
        self._lock_watch = LockWatch(self._on_lock_closed)
        try:
            self._lock_watch.start()
        except OSError as error:
            _log.warning(f"The xtables lock can't be watched: {error}; legacy changes are seen after {LEGACY_LOOK} s")

    def _unwatch(self) -> None:
        if self._lock_watch:
            self._lock_watch.stop()
        self._witness.close()
        self._links.close()
        self._link_events.close()
        self._selector.close()

    # The turn

    def _turn(self) -> None:
        self._heart.beat()
        now = time.monotonic()
        due = min(self._due.next, self._summary.due, self._metrics.due, self._surroundings.due)
        due = min(due, now + self._governor.due)
        timeout = max(0.0, due - now)
        if self._heart.longest_sleep is not None:
            timeout = min(timeout, self._heart.longest_sleep)
        # What is there already came at some time of the last turn's work: told from its beginning, no exposure is told
        # too short.
        since, ready = self._turned, self._selector.select(0)
        if not ready and not self._witness.waiting:
            self._urgency.begin()
            with self._heart.sleeping(timeout):
                ready = self._selector.select(timeout)
            since = time.monotonic()
        noticed = self._turned = time.monotonic()
        sources = {key.fileobj for key, _ in ready}
        with self._heart.working():
            try:
                wake = self._answer(since)
                if wake is None and sources == {self._witness.events} and noticed < due:
                    # Others' transactions that don't concern us: on a busy node they are most of what is heard.
                    if self._witness.rest(due - noticed, self._bell):
                        self._turned = time.monotonic()
                    return
                self._urgency.end()
                self._react(sources, since, wake)
                self._failed = False
            except Exception as error:  # the top of the loop: whatever it was, the next event gets its chance
                self._failed = True
                self._urgency.end()
                _log.exception(f"A pass failed: {type(error).__name__}: {error}; trying again soon")
            self._after_pass()
            self._write_metrics(noticed)

    def _answer(self, since: float) -> Wake | None:
        """Hear of transactions, and put right what one message can, before anything else."""
        wake = self._witness.heard(since)
        if wake and self._ready:
            self._reconciler.strike(wake)
        return wake

    def _react(self, sources: set[Any], noticed: float, wake: Wake | None) -> None:
        if self._bell in sources:
            self._drain_bell()
            closed, self._lock_closed = self._lock_closed, 0.0
            if closed and self._reconciler.backend is Backend.LEGACY:
                wake = wake or Wake(closed)
        if self._link_events in sources and self._link_events.drain():
            self._due.relink = min(self._due.relink, noticed + _SETTLE)
        if wake and self._ready:
            self._surroundings.woken(wake, self._reconciler.wake(wake))
        self._obey_signals()
        self._desk.work(self._obey)
        self._governor.follow_files()
        self._keep_time()

    def _drain_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell, 1 << 16)  # as much as a pipe holds

    def _keep_time(self) -> None:
        now = time.monotonic()
        due = self._due
        for told in self._summary.flush(now):
            announce(told)
        if self._governor.due <= 0:
            self._governor.expire()
        if now >= self._surroundings.due:
            self._surroundings.look(self._reconciler.backend)
        if now >= due.retry or now >= due.resync:
            self._disk.catch_up()
        if self._governor.owed and not self._resting:
            due.relink = due.look = float("inf")  # the start looks at everything
            if now >= due.retry or now >= due.resync:
                due.retry, due.resync = float("inf"), now + self._governor.config.daemon.resync
                self._governor.start()
            return
        if now >= due.relink:
            due.relink = float("inf")
            self._reconciler.relink()
        if now >= due.resync or now >= due.retry:
            due.resync, due.retry = now + self._governor.config.daemon.resync, float("inf")
            sweep()
            self._reconciler.resync()
            due.look = float("inf")  # it has looked at everything
            self._surroundings.look(self._reconciler.backend)
        if self._reconciler.backend is Backend.LEGACY:
            if now >= due.look:
                wake = Wake(now, exact=False)
                self._surroundings.woken(wake, self._reconciler.wake(wake))
            if now >= due.look or due.look == float("inf"):
                due.look = now + max(LEGACY_LOOK, _LOOK_REST * (time.monotonic() - now))
        else:
            due.look = float("inf")

    def _after_pass(self) -> None:
        """Health: what there is to tell, told once; and when to try again what could not be done."""
        now = time.monotonic()
        self._governor.note_good()
        self._witness.attend(self._reconciler.places, every=self._reconciler.attentive)
        sound = not self._governor.owed and self._reconciler.in_force
        in_trouble = self._failed or self._disk.trouble or not (self._resting or sound)
        if not in_trouble:
            self._due.retry, self._due.pause = float("inf"), _RETRY_FIRST
        elif self._due.retry == float("inf"):
            self._due.retry = now + self._due.pause
            self._due.pause = min(self._due.pause * 2, _RETRY_LAST)
        self._due.retry = min(self._due.retry, self._reconciler.due)
        begun = not self._governor.owed and not self._reconciler.blocked
        if not self._ready and (begun or self._resting):
            self._ready = True
            self._tell_state()
            self._notifier.ready(self.status.sentence())
        self._tell_state()

    def _tell_state(self) -> None:
        reasons = self._reasons()
        state = self._state(reasons)
        before, self._told = self._told, (state, reasons)
        if before[0] is not state:
            self._since = datetime.now(UTC)
        old, self.status = self.status, self._status()
        for event in contention_events(old.contention, self.status.contention):
            self._record(event)
        if before != self._told:
            if reasons and state in {State.DEGRADED, State.STARTING}:
                self._record(_event(Kind.DEGRADED, "; ".join(reasons)))
            elif before[1] and state is State.ENFORCING:
                self._record(_event(Kind.RECOVERED, "everything is in force again"))
        if old.sentence() != self.status.sentence():
            self._notifier.status(self.status.sentence())

    def _write_metrics(self, noticed: float) -> None:
        """Count the pass that began when it was `noticed`, and write what is due."""

        def look() -> Snapshot:
            return Snapshot(self.status, self._reconciler.set_sizes(), self._reconciler.counts())

        now = time.monotonic()
        self._metrics.passed(now - noticed)
        self._metrics.write(self._governor.config.daemon.metrics, look, now)

    @property
    def _resting(self) -> bool:
        """Whether nothing is to be enforced now, because somebody asked for that."""
        return self._governor.idle or self._governor.paused_until is not None

    def _reasons(self) -> tuple[str, ...]:
        disk = (self._disk.trouble,) if self._disk.trouble else ()
        return (*self._governor.reasons, *self._reconciler.reasons, *disk)

    def _state(self, reasons: tuple[str, ...]) -> State:
        if self._governor.idle:
            return State.IDLE
        if self._governor.paused_until is not None:
            return State.PAUSED
        if not self._ready:
            return State.STARTING
        return State.DEGRADED if reasons else State.ENFORCING

    def _status(self) -> Status:
        reconciler, governor = self._reconciler, self._governor
        state, reasons = self._told
        families = {}
        for family in governor.config.daemon.families if state in {State.ENFORCING, State.DEGRADED} else ():
            families[family] = State.DEGRADED if reconciler.family_reasons(family) else State.ENFORCING
        return Status(
            state=state,
            since=self._since,
            version=__version__,
            pid=os.getpid(),
            config=ConfigStatus(
                path=governor.config.path,
                generation=governor.generation,
                loaded_at=governor.loaded_at,
                error=governor.error or None,
            ),
            note=governor.note,
            reasons=reasons,
            backend=reconciler.backend,
            desired=reconciler.desired,
            in_place=reconciler.in_place,
            repairs=self._history.count(Kind.REPAIR),
            last_repair=self._history.last_repair,
            contention=reconciler.contention(),
            neighbours=self._surroundings.neighbours,
            bypasses=self._surroundings.bypasses,
            families=families,
            shield=reconciler.shield,
        )

    def _record(self, event: Event) -> None:
        """Every event goes into the history; the journal hears of a flood in short."""
        self._history.add(event)
        self._metrics.take(event)
        for told in self._summary.take(event, time.monotonic()):
            announce(told)

    # What people ask for

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals.add(number)

    def _on_lock_closed(self) -> None:
        """In watchdog's thread: somebody has let go of the xtables lock."""
        self._lock_closed = self._lock_closed or time.monotonic()  # of several, the first that was not looked at yet
        self._wake_up()

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._ring, b"!")

    def _obey_signals(self) -> None:
        signals, self._signals = self._signals, set()
        if signals & {signal.SIGTERM, signal.SIGINT}:
            self._stopping.set()
        elif signal.SIGHUP in signals:
            with contextlib.suppress(Refused):
                self._reload({})

    def _obey(self, request: Request) -> dict[str, Any]:
        args, governor = request.args, self._governor
        match request.command:
            case "reload":
                return self._reload(args)
            case "try":
                connection = parse_connection(str(args.get("connection", "")))
                directory, seconds = Path(str(args.get("directory"))), _seconds(args)
                return governor.begin_trial(directory, seconds, connection, yes=args.get("yes") is True)
            case "pause":
                return governor.pause(_seconds(args))
            case "set":
                return governor.change_set(args)
        changes = {
            "confirm": governor.confirm,
            "revert": governor.revert,
            "resume": governor.resume,
            "remove": governor.remove,
        }
        return changes[request.command]()

    def _reload(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """systemd hears of a reload's begin and end, whatever comes of it."""
        self._notifier.reloading("Reloading")
        try:
            taken = self._governor.reload(parse_connection(str(args.get("connection", ""))))
            self._ready = True
            self._surroundings.forget()
        finally:
            self._tell_state()
            self._notifier.ready(self.status.sentence())
        self._due.resync = time.monotonic() + self._governor.config.daemon.resync
        return {**taken, "state": self.status.state.value}


def _seconds(args: Mapping[str, Any]) -> float:
    seconds = args.get("seconds")
    if not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
        raise Refused(f"the time must be more than 0 and at most {LONGEST:g} seconds")
    return float(seconds)


def _event(kind: Kind, what: str) -> Event:
    return Event(time=datetime.now(UTC), kind=kind, what=what)
