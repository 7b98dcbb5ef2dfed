"""`nodewallctl` as people and scripts meet it: what it prints where, and with which exit status it ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodewalld.commands import ctl
from nodewalld.configuration.errors import ConfigError
from nodewalld.core.config import Config, Problem, SetEntry, Where
from nodewalld.core.lints.facts import NodeFacts
from nodewalld.service import wire
from nodewalld.service.control import ControlServer, Request
from nodewalld.service.instance import Instance
from nodewalld.service.wire import Refused

REPAIR = {
    "time": "2026-01-02T03:04:05.000006Z",
    "kind": "repair",
    "family": "ipv6",
    "table": "mangle",
    "chain": "PREROUTING",
    "reason": "missing",
    "what": "put back",
    "by": {"pid": 4711, "comm": "iptables-nft-re", "name": "dockerd", "parents": [{"pid": 1, "comm": "dockerd"}]},
    "exposed_ms": 1.25,
    "latency_ms": 0.5,
    "message": "Put back the jump\x1b[31m",
}
RELOAD = {"time": "2026-01-02T03:04:05.000006Z", "kind": "reload", "what": "took generation 3 " + "x" * 80}
STATUS = {
    "state": "degraded",
    "since": "2026-01-02T03:04:05.000006Z",
    "reasons": ["no chain DOCKER-USER", "no ipset"],
    "backend": "nft",
    "version": "0.1.0",
    "pid": 7,
    "config": {"path": "/etc/nodewalld", "generation": 3, "loaded_at": None, "error": "a.toml:1: port: wrong"},
    "rules": {"desired": 12, "in_place": 10},
    "repairs": 4,
    "last_repair": REPAIR,
    "contention": [{"what": "felix insists on the top"}],
    "families": {"ipv4": "enforcing", "ipv6": "degraded"},
}
PROBLEM = Problem(Where("/etc/nodewalld/a.toml", 3), "port.ports", "70000 is no port", "1 to 65535")
CHANGE = {
    "family": "ipv4",
    "table": "mangle",
    "chain": "PREROUTING",
    "reason": "missing",
    "why": "the jump was not there",
    "entries": ["port/vault"],
    "commands": ["-I PREROUTING 1 -j NODEWALL-PREROUTING"],
}
CHAIN = {
    "family": "ipv4",
    "table": "mangle",
    "chain": "PREROUTING",
    "exists": {"before": True, "after": True},
    "rules": [
        {"before": None, "after": 1, "rule": "-j NODEWALL-PREROUTING", "entries": ["port/vault"]},
        *({"before": n, "after": n + 1, "rule": f"-j KUBE-{n}", "entries": []} for n in range(1, 6)),
    ],
}
SET = {
    "family": "ipv6",
    "table": "ipset",
    "chain": "office-v6",
    "reason": "changed",
    "why": "the set office-v6 holds 1 entries instead of 2",
    "commands": ["add office-v6 2001:db8::1/128", "del office-v6 2001:db8::2/128"],
}
NOTHING: dict[str, Any] = {"changes": [], "chains": []}
ROW = {
    "family": "ipv4",
    "table": "mangle",
    "chain": "PREROUTING",
    "position": 1,
    "entry": "port/vault",
    "rule": "-p tcp --dport 31002 -j DROP",
    "packets": 12,
    "bytes": 123_456_789,
}


class FakeOffline:
    """A kernel whose answers a test chooses; an exception as answer is raised."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def _answer(self, *asked: Any) -> Any:
        self.asked.append(asked)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def remove(self, state_dir: Path) -> dict[str, Any]:
        return self._answer("remove", state_dir)

    def plan(self, config_dir: Path, state_dir: Path) -> dict[str, list[dict[str, Any]]]:
        return self._answer("plan", config_dir, state_dir)

    def show(self, config_dir: Path, state_dir: Path) -> list[dict[str, Any]]:
        return self._answer("show", config_dir, state_dir)

    def iptables_only(self, config_dir: Path) -> list[dict[str, Any]]:
        return [{"entry": "rule/raw", "reason": "because"}]

    def compiled(self, config_dir: Path) -> str:
        return self._answer("compiled", config_dir)

    def try_texts(self, config: Config) -> tuple[Problem, ...] | str:
        return self._answer("try_texts", config)

    def survey(self, config: Config, connection: str) -> NodeFacts:
        return NodeFacts()


class Daemon:
    """A real control socket; `replies` by command, an exception is raised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.replies: dict[str, Any] = {}
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Any:
        self.requests.append(request)
        reply = self.replies[request.command]
        if isinstance(reply, Exception):
            raise reply
        return reply(request) if callable(reply) else reply


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "run")
    with Instance(daemon.folder) as instance, ControlServer(instance, daemon):
        yield daemon


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line; `offline` answers for the kernel, `load` for the files."""

    def run(*argv: str, offline: Any = None, load: Any = None) -> tuple[int, str, str]:
        def loaded(_directory: Path, *, check_owner: bool = True) -> Config:
            if isinstance(load, Exception):
                raise load
            return load or Config(path="/etc/nodewalld")

        fake = offline if isinstance(offline, FakeOffline) else FakeOffline(offline)
        tools = ctl.Tools(lambda: fake, lambda: loaded)
        status = ctl.main(["--runtime-dir", str(tmp_path / "run"), *argv], tools=tools)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize(
    ("state", "status"), [("enforcing", 0), ("degraded", 3), ("starting", 3), ("paused", 3), ("idle", 3)]
)
def test_status_says_by_its_exit_whether_the_rules_are_in_force(
    run: Run, daemon: Daemon, state: str, status: int
) -> None:
    daemon.replies["status"] = {**STATUS, "state": state}
    assert run("status")[0] == status
    exit_status, out, _ = run("status", "--json")
    assert exit_status == status
    assert json.loads(out) == {**STATUS, "state": state}


def test_status_prints_one_screen_with_everything_that_matters(run: Run, daemon: Daemon) -> None:
    daemon.replies["status"] = STATUS
    out = run("status")[1]
    for word in (
        "nodewalld: degraded since 2026-01-02",
        "  - no chain DOCKER-USER",
        "  - no ipset",
        "  rules:      10 of 12 in place (IPv4 enforcing, IPv6 degraded)",
        "  backend:    nft",
        "/etc/nodewalld, generation 3",
        "not taken: a.toml:1: port: wrong",
        "  repairs:    4, last 2026-01-02",
        "Put back the jump\\x1b[31m",
        "felix insists on the top",
    ):
        assert word in out
    assert "\x1b" not in out
    assert len(out.splitlines()) < 24


@pytest.mark.parametrize(("terminal", "begins"), [(True, "\x1b[Hnodewalld: "), (False, "nodewalld: ")])
def test_watching_shows_what_changes_and_a_daemon_that_goes(
    run: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, terminal: bool, begins: str
) -> None:
    states = iter(["degraded", "enforcing", "enforcing", wire.NoDaemon("nodewalld is not running"), "enforcing"])

    def call(*_asked: object) -> dict[str, Any]:
        state = next(states, KeyboardInterrupt())
        if isinstance(state, BaseException):
            raise state
        return {**STATUS, "state": state}

    monkeypatch.setattr(ctl.client, "call", call)
    monkeypatch.setattr(ctl, "_WATCH_EVERY", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    status, out, _ = run("status", "--watch")
    assert status == 130
    assert out.startswith(begins)
    screens = out.split("nodewalld: ")[1:]
    told = [screen.split(" ")[0] for screen in screens]
    assert told == ["degraded", "enforcing", "enforcing"]
    assert "nodewalld is not running" in screens[1]


EXPOSED = {"since": "2026-01-02T03:04:05Z", "count": 3, "total_ms": 21.2, "longest_ms": 17.3, "by": ["sh", "dockerd"]}


def test_status_tells_of_exposures_neighbours_and_bypasses_as_far_as_the_daemon_does(run: Run, daemon: Daemon) -> None:
    dead = {"what": "published ports of Docker are dead since 12:03: systemctl restart docker"}
    daemon.replies["status"] = {**STATUS, "exposures": EXPOSED, "neighbours": [dead], "bypasses": []}
    out = run("status")[1]
    assert "  exposed:    3 times since Jan 02 " in out
    assert "21.2 ms in all, at most 17.3 ms, by sh, dockerd" in " ".join(out.split())
    assert "  neighbours: published ports of Docker are dead since 12:03: systemctl restart" in out
    assert "  bypasses:   none seen" in out
    once = {**EXPOSED, "count": 1, "total_ms": 17.3, "by": []}
    daemon.replies["status"] = {**STATUS, "exposures": once}
    out = run("status")[1]
    assert ", 17.3 ms\n" in out
    assert "neighbours" not in out
    assert "bypasses" not in out
    daemon.replies["status"] = {**STATUS, "exposures": {**EXPOSED, "count": 0}, "contention": []}
    out = run("status")[1]
    assert "  exposed:    never since Jan 02 " in out
    assert "  contention: none\n" in out


def test_status_stays_one_screen_of_80_columns_however_much_there_is_to_tell(run: Run, daemon: Daemon) -> None:
    long = "ipv4: forward/pods in filter FORWARD: " + "none of its anchors is in the chain " * 4
    many = {name: [{"what": long}] * 30 for name in ("contention", "neighbours", "bypasses")}
    config = {**STATUS["config"], "error": f"a.toml:1: {long}", "loaded_at": STATUS["since"]}
    daemon.replies["status"] = {**STATUS, **many, "reasons": [long] * 30, "exposures": EXPOSED, "config": config}
    lines = run("status")[1].splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len(lines) < 24
    for name in ("rules", "config", "exposed", "contention", "neighbours", "bypasses", "daemon"):
        assert any(line.startswith(f"  {name}:") for line in lines)
    assert sum("and 29 more" in line for line in lines) == 4


def test_status_of_a_younger_or_older_daemon_is_printed_as_far_as_it_goes(run: Run, daemon: Daemon) -> None:
    daemon.replies["status"] = {"state": "enforcing", "news": 1}
    status, out, _ = run("status")
    assert status == 0
    assert "enforcing" in out


def test_status_without_a_daemon_is_4(run: Run) -> None:
    status, out, err = run("status")
    assert (status, out) == (4, "")
    assert "nodewalld is not running" in err
    status, out, _ = run("status", "--json")
    assert status == 4
    assert "not running" in json.loads(out)["error"]


@pytest.mark.parametrize("command", ["history", "reload"])
def test_other_commands_without_a_daemon_are_1(run: Run, command: str) -> None:
    status, _, err = run(command)
    assert status == 1
    assert "nodewalld is not running" in err


def test_history_fits_80_columns(run: Run, daemon: Daemon) -> None:
    long = {**REPAIR, "chain": "A" * 28, "by": {"pid": 1, "comm": "containerd-shim"}, "exposed_ms": 119_999.0}
    daemon.replies["history"] = [REPAIR, RELOAD, long]
    status, out, _ = run("history", "-n", "3")
    assert status == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "6 mangle PREROUTING" in out
    assert "1.2 ms dockerd" in out
    assert dict(daemon.requests[0].args) == {"n": 3, "follow": False}


def test_history_cuts_nothing(run: Run, daemon: Daemon) -> None:
    longest = {**REPAIR, "chain": "NODEWALL-f-pods-from-nodes", "flows_deleted": 2}
    daemon.replies["history"] = [longest, {**RELOAD, "flows_deleted": 1}]
    out = run("history")[1]
    assert "dockerd; 2 flows cut" in " ".join(line[70:].strip() for line in out.splitlines()[1:4])
    assert "; 1 flow cut" in out
    assert [line[27:51].strip() for line in out.splitlines()[1:4]] == ["6 mangle NODEWALL-f-", "pods-from-nodes", ""]
    assert out.count("x") == 80


def test_history_as_json_is_one_event_a_line(run: Run, daemon: Daemon) -> None:
    daemon.replies["history"] = [REPAIR, RELOAD]
    _, out, _ = run("history", "--json")
    assert [json.loads(line) for line in out.splitlines()] == [REPAIR, RELOAD]


def test_history_f_goes_on_until_the_daemon_ends(run: Run, daemon: Daemon) -> None:
    daemon.replies["history"] = lambda request: iter([[REPAIR], RELOAD, None]) if request.args["follow"] else []
    status, out, _ = run("history", "-f", "--json")
    assert status == 0
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["repair", "reload"]


def test_a_reload_that_is_taken_says_which_generation_holds(run: Run, daemon: Daemon) -> None:
    daemon.replies["reload"] = {"generation": 4, "changed": True, "state": "enforcing"}
    assert run("reload") == (0, "Generation 4 taken; nodewalld is enforcing.\n", "")


def test_a_reload_that_is_refused_shows_each_problem(run: Run, daemon: Daemon) -> None:
    daemon.replies["reload"] = Refused("the old rules stay", (str(PROBLEM),))
    status, out, err = run("reload")
    assert (status, out) == (1, "")
    assert err == f"{PROBLEM}\nnodewallctl: the old rules stay\n"
    status, out, _ = run("reload", "--json")
    assert status == 1
    assert json.loads(out) == {"error": "the old rules stay", "problems": [str(PROBLEM)]}


def test_remove_asks_the_daemon_where_there_is_one(run: Run, daemon: Daemon) -> None:
    daemon.replies["remove"] = {"removed": {"rules": 3, "chains": 1, "sets": 0}}
    fake = FakeOffline()
    assert run("remove", offline=fake) == (0, "Removed 3 rules, 1 chain, 0 sets.\n", "")
    assert fake.asked == []


def test_remove_without_a_daemon_does_it_itself_under_the_daemons_lock(run: Run, tmp_path: Path) -> None:
    class Locked(FakeOffline):
        def remove(self, state_dir: Path) -> dict[str, Any]:
            with pytest.raises(Exception, match="already running"):
                Instance(tmp_path / "run")
            return super().remove(state_dir)

    fake = Locked({"removed": {"rules": 0, "chains": 2, "sets": 1}})
    status, out, _ = run("remove", "--json", "--state-dir", "/s", offline=fake)
    assert status == 0
    assert json.loads(out) == {"removed": {"rules": 0, "chains": 2, "sets": 1}}
    assert fake.asked == [("remove", Path("/s"))]


def test_remove_does_not_work_against_a_daemon_that_is_just_starting(run: Run, tmp_path: Path) -> None:
    fake = FakeOffline()
    with Instance(tmp_path / "run"):
        status, _, err = run("remove", offline=fake)
    assert status == 1
    assert f"pid {os.getpid()}" in err
    assert fake.asked == []


def test_plan_is_0_for_nothing_and_3_for_something(run: Run) -> None:
    assert run("plan", offline=NOTHING) == (0, "Nothing to change.\n", "")
    value = {"changes": [SET, CHANGE], "chains": [CHAIN]}
    status, out, _ = run("plan", offline=value)
    assert status == 3
    assert out.splitlines() == [
        "ipset office-v6 (IPv6): changed",
        "  the set office-v6 holds 1 entries instead of 2",
        "  + add office-v6 2001:db8::1/128",
        "  - del office-v6 2001:db8::2/128",
        "",
        "mangle PREROUTING (IPv4): missing",
        "  the jump was not there (port/vault)",
        "  BEFORE AFTER",
        "             1 + -j NODEWALL-PREROUTING [port/vault]",
        "       1     2   -j KUBE-1",
        "       2     3   -j KUBE-2",
        "           ... 3 rules more, unchanged",
        "",
        "2 changes.",
    ]
    status, out, _ = run("plan", "--json", offline=value)
    assert (status, json.loads(out)) == (3, value)


def test_plan_folds_what_is_long_and_cuts_nothing_but_a_sets_entries(run: Run) -> None:
    ports = ",".join(str(port) for port in range(30000, 30015))
    words = f'-p tcp -m multiport --dports {ports} -m comment --comment "a \\"long\\" one" -j {"N" * 28}'
    rules = [{"before": 12345, "after": None, "rule": words, "entries": ["port/a", "port/b", "port/c"]}]
    many = {**SET, "commands": [f"add office 10.0.0.{n}/32" for n in range(30)]}
    status, out, _ = run("plan", offline={"changes": [CHANGE, many], "chains": [{**CHAIN, "rules": rules}]})
    assert status == 3
    assert all(len(line) <= 80 for line in out.splitlines())
    told = " ".join(line[17:] for line in out.splitlines() if line.startswith("   ")).replace(", ", ",")
    assert words.split()[:5] == told.split()[:5]
    assert ports in told.replace(" ", "")
    assert "port/a,port/b and 1 more" in told
    assert "  ... 20 more" in out


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (PermissionError(1, "Operation not permitted"), "needs root"),
        (ConfigError((PROBLEM,)), str(PROBLEM)),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "show", "remove"])
def test_what_cannot_be_read_is_a_sentence_and_1(run: Run, failure: Exception, words: str, command: str) -> None:
    status, out, err = run(command, offline=failure)
    assert (status, out) == (1, "")
    assert words in err


def test_plan_takes_the_folder_that_is_named_last(run: Run) -> None:
    fake = FakeOffline(NOTHING)
    run("plan", "--config", "/a", "/b", "--state-dir", "/s", offline=fake)
    run("--config", "/a", "plan", offline=fake)
    run("plan", "--config", "/c", offline=fake)
    assert [asked[1] for asked in fake.asked] == [Path("/b"), Path("/a"), Path("/c")]


def test_show_groups_the_rules_by_chain_and_cuts_no_rule(run: Run) -> None:
    long = "-m comment --comment nodewalld:port/vault -m set --match-set office src -m tcp --dport 1 " + "-x" * 60
    other = {**ROW, "family": "ipv6", "position": None, "packets": None, "rule": long, "entries": ["port/a", "port/b"]}
    again = {**ROW, "position": 2}
    _, out, _ = run("show", offline=[ROW, other, again])
    lines = out.splitlines()
    assert lines[:3] == [
        "mangle PREROUTING (IPv4)",
        "  POS  PACKETS   BYTES ENTRY          RULE",
        "    1       12    123M port/vault     -p tcp --dport 31002 -j DROP",
    ]
    assert "mangle PREROUTING (IPv6)" in lines
    assert "mangle PREROUTING (IPv4), continued" in lines
    assert all(len(line) <= 80 for line in lines)
    start = lines.index("mangle PREROUTING (IPv6)") + 2
    text = " ".join(line[38:].strip() for line in lines[start : lines.index("", start)])
    assert "-m set --match-set office src -m tcp --dport 1" in text
    assert "nodewalld:" not in text
    assert text.replace(" ", "").count("-x") == 60
    assert [line.split() for line in lines[-2:]] == [
        ["iptables", "only", "(not", "in", "the", "shield)"],
        ["rule/raw", "because"],
    ]
    only = [{"entry": "rule/raw", "reason": "because"}]
    assert json.loads(run("show", "--json", offline=[ROW])[1]) == {"rules": [ROW], "iptables_only": only}


def test_show_compiled_prints_iptables_text(run: Run) -> None:
    assert run("show", "--compiled", offline="*mangle\nCOMMIT\n")[1] == "*mangle\nCOMMIT\n"


def test_check_of_a_good_configuration_counts_its_entries(run: Run) -> None:
    sets = tuple(SetEntry(name, (), (), Where("a", 1)) for name in ("a", "b"))
    status, out, err = run("check", "/d", offline=(), load=Config(path="/d", sets=sets))
    assert (status, out, err) == (0, "/d: good: 2 sets\n", "")


def test_check_names_file_line_key_and_cure(run: Run) -> None:
    status, out, err = run("check", load=ConfigError((PROBLEM,)))
    assert (status, out) == (1, "")
    assert "/etc/nodewalld/a.toml:3: port.ports: 70000 is no port (1 to 65535)\n" in err
    _, out, _ = run("check", "--json", load=ConfigError((PROBLEM,)))
    assert json.loads(out) == {
        "errors": [
            {
                "file": "/etc/nodewalld/a.toml",
                "line": 3,
                "key": "port.ports",
                "message": "70000 is no port",
                "cure": "1 to 65535",
                "code": "",
            }
        ],
        "warnings": [],
        "tried": False,
        "untried_reason": "the configuration has errors",
        "node_read": False,
        "node_unread_reason": "the configuration has errors",
    }


def test_check_warns_and_strict_makes_errors_of_warnings(run: Run) -> None:
    config = Config(path="/d", warnings=(PROBLEM,))
    status, _, err = run("check", offline=(), load=config)
    assert status == 0
    assert err.startswith("warning: /etc/nodewalld/a.toml:3:")
    status, _, err = run("check", "--strict", offline=(), load=config)
    assert status == 1
    assert "warning" not in err


def test_check_calls_a_note_what_nothing_can_cure_and_strict_does_not_count_it(run: Run) -> None:
    note = Problem(Where("a.toml", 1), "port.a", "is open elsewhere", code="open-on-other-nodes")
    status, _, err = run("check", "--strict", offline=(), load=Config(path="/d", warnings=(note,)))
    assert (status, err) == (0, "note: a.toml:1: port.a: is open elsewhere [open-on-other-nodes]\n")


def test_check_ignores_only_codes_that_there_are(run: Run) -> None:
    status, _, err = run("check", "--ignore", "no-such-code", offline=())
    assert status == 2
    assert "input-after-dnat" in err
    assert run("check", "--ignore", "set-type", offline=())[0] == 2  # an error can't be ignored
    assert run("check", "--ignore", "ipv4-only", "--ignore", "no-failsafe", offline=())[0] == 0


def test_check_tells_what_iptables_refuses(run: Run) -> None:
    status, _, err = run("check", offline=(PROBLEM,))
    assert status == 1
    assert str(PROBLEM) in err


def test_check_tells_when_it_could_not_try(run: Run) -> None:
    status, out, err = run("check", offline="user namespaces are forbidden")
    assert status == 0
    assert "good" in out
    assert err == "could not try the rule texts: user namespaces are forbidden\n"
    value = json.loads(run("check", "--json", offline="forbidden")[1])
    assert (value["tried"], value["untried_reason"]) == (False, "forbidden")


@pytest.mark.parametrize(
    "argv",
    [["nonsense"], [], ["status", "extra"], ["history", "-n", "-3"], ["history", "-n", "x"], ["--jso", "status"]],
)
def test_usage_errors_are_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        ctl.main(argv)
    assert left.value.code == 2
    assert "usage: nodewallctl" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(ctl.COMMANDS))
def test_each_help_has_examples_that_are_right(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        ctl.main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for example in ctl.COMMANDS[command].examples:
        assert example in text
        name, *argv = shlex.split(example)
        assert name == "nodewallctl"
        assert ctl._parser().parse_args(argv).command == command


def program(daemon: Daemon, *argv: str) -> list[str]:
    return [sys.executable, "-m", "nodewalld.commands.ctl", "--runtime-dir", str(daemon.folder), *argv]


def test_a_reader_that_has_enough_gets_no_traceback(daemon: Daemon) -> None:
    daemon.replies["history"] = [REPAIR] * 2000
    with subprocess.Popen(program(daemon, "history"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


def test_ctrl_c_ends_following_quietly_with_130(daemon: Daemon) -> None:
    def follow(_request: Request) -> Iterator[Any]:
        yield [REPAIR]
        while True:
            yield None

    daemon.replies["history"] = follow
    argv = program(daemon, "history", "-f", "--json")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait(20) == 130


def test_status_imports_nothing_heavy(daemon: Daemon) -> None:
    daemon.replies["status"] = {"state": "enforcing"}
    code = (
        "import sys; from nodewalld.commands.ctl import main; status = main(sys.argv[1:]); "
        "heavy = {'structlog', 'pyroute2', 'watchdog', 'tomllib', 'subprocess', 'asyncio'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else status)"
    )
    argv = [sys.executable, "-c", code, "--runtime-dir", str(daemon.folder), "status"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
