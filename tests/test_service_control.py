"""The control socket: who is answered, what a client may do to the others (nothing), and one daemon per folder."""

import json
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from nodewalld.service import client, wire
from nodewalld.service.control import ControlServer, Limits, Request
from nodewalld.service.instance import AlreadyRunning, Instance
from nodewalld.service.wire import NoAnswer, NoDaemon, Peer, Refused

QUICK = Limits(clients=4, request=0.3, send=1.0, close=0.3)


class Desk:
    """A handler with one command for each way in which a handler can behave."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.entered = threading.Event()
        self.stream_ended = threading.Event()
        self.peers: list[Peer] = []

    def __call__(self, request: Request) -> object:
        self.peers.append(request.peer)
        match request.command:
            case "echo":
                return dict(request.args)
            case "refuse":
                raise Refused("no", ("a.toml:1: port: wrong (right)",))
            case "fail":
                raise OSError("a disk is full")
            case "unsendable":
                return object()
            case "wait":
                self.entered.set()
                assert self.release.wait(20)
                return "waited"
            case "follow":
                return self._follow()
        raise Refused(f"no command {request.command!r}")

    def _follow(self) -> Iterator[object]:
        try:
            yield ["past"]
            yield "next"
            while not self.release.wait(0.01):
                yield None
        finally:
            self.stream_ended.set()


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.release.set()


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    with Instance(tmp_path / "run") as instance:
        yield instance


@pytest.fixture
def server(instance: Instance, desk: Desk) -> Iterator[ControlServer]:
    with ControlServer(instance, desk, limits=QUICK) as server:
        yield server
        desk.release.set()


def raw(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20)
    connection.connect(str(path))
    return connection


def say(path: Path, data: bytes) -> list[dict[str, object]]:
    """Send bytes, end the sending side, and read all replies."""
    with raw(path) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as lines:
            return [json.loads(line) for line in lines]


def test_a_request_is_answered_and_the_handler_knows_who_asks(server: ControlServer, desk: Desk) -> None:
    assert client.call(server.path, {"command": "echo", "n": 3}, 5) == {"n": 3}
    assert desk.peers == [Peer(os.getpid(), os.geteuid())]


def test_socket_and_folder_are_for_their_owner_only(server: ControlServer) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.path.parent.stat().st_mode) == 0o700


def test_a_refusal_reaches_the_client_with_its_problems(server: ControlServer) -> None:
    with pytest.raises(Refused) as refused:
        client.call(server.path, {"command": "refuse"}, 5)
    assert refused.value.error == "no"
    assert refused.value.problems == ("a.toml:1: port: wrong (right)",)


@pytest.mark.parametrize("command", ["fail", "unsendable"])
def test_a_handler_that_fails_is_told_and_the_socket_lives_on(server: ControlServer, command: str) -> None:
    with pytest.raises(Refused, match="internal error"):
        client.call(server.path, {"command": command}, 5)
    assert client.call(server.path, {"command": "echo"}, 5) == {}


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[1]", b'{"n": 1}', b'{"command": 7}', b"\xff\xfe", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"],
    ids=["word", "list", "no-command", "number", "bytes", "deep", "digits"],
)
def test_a_malformed_request_is_answered_and_the_next_one_served(server: ControlServer, line: bytes) -> None:
    bad, good = say(server.path, line + b'\n{"command":"echo"}\n')
    assert bad["ok"] is False
    assert str(bad["error"]).startswith("the request is ")
    assert good == {"ok": True, "value": {}}


def test_a_request_without_a_last_newline_is_a_request(server: ControlServer) -> None:
    assert say(server.path, b'{"command":"echo"}') == [{"ok": True, "value": {}}]


def test_a_request_that_never_ends_is_cut_off(server: ControlServer) -> None:
    with raw(server.path) as connection:
        with suppress(OSError):  # cut off while still sending
            connection.sendall(b"x" * (wire.REQUEST_MAX + (1 << 20)))
        with connection.makefile("rb") as lines:
            try:
                reply = lines.readline()
            except ConnectionResetError:
                return  # the kernel threw the reply away with what was not read
    assert reply == b"" or b"a request may have" in reply


def test_a_silent_client_loses_its_place_in_time(server: ControlServer) -> None:
    with raw(server.path) as connection, connection.makefile("rb") as lines:
        assert "no request within" in json.loads(lines.readline())["error"]
        assert lines.readline() == b""


def test_a_slow_request_does_not_buy_time_with_each_byte(instance: Instance, desk: Desk) -> None:
    left, right = socket.socketpair()
    with left, right:
        lines = wire.Lines(left, 100)
        done = threading.Event()

        def drip() -> None:
            while not done.wait(0.02):
                right.send(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                lines.read(0.2)
        finally:
            done.set()
            thread.join()


def test_a_busy_handler_holds_up_nobody_else(server: ControlServer, desk: Desk) -> None:
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(client.call(server.path, {"command": "wait"}, 20)))
    waiting.start()
    assert desk.entered.wait(20)
    assert client.call(server.path, {"command": "echo"}, 5) == {}
    desk.release.set()
    waiting.join()
    assert answers == ["waited"]


def test_a_stream_gives_what_was_and_what_comes(server: ControlServer, desk: Desk) -> None:
    with closing(client.stream(server.path, {"command": "follow"}, 5)) as values:
        assert next(values) == ["past"]
        assert next(values) == "next"


def test_a_follower_that_vanishes_frees_its_place(server: ControlServer, desk: Desk) -> None:
    with closing(client.stream(server.path, {"command": "follow"}, 5)) as values:
        next(values)
        assert not desk.stream_ended.is_set()
    assert desk.stream_ended.wait(20)


def test_a_follower_that_only_ended_its_requests_still_listens(server: ControlServer, desk: Desk) -> None:
    with raw(server.path) as connection, connection.makefile("rb") as lines:
        connection.sendall(b'{"command":"follow"}\n')
        connection.shutdown(socket.SHUT_WR)
        assert [json.loads(lines.readline())["value"] for _ in range(2)] == [["past"], "next"]
        assert not desk.stream_ended.wait(0.1)


def test_a_stream_that_ends_ends_its_connection_and_frees_its_place(server: ControlServer, desk: Desk) -> None:
    desk.release.set()
    for _ in range(QUICK.clients + 1):
        assert list(client.stream(server.path, {"command": "follow"}, 5)) == [["past"], "next"]


def test_followers_leave_room_for_questions(server: ControlServer, desk: Desk) -> None:
    followers = [client.stream(server.path, {"command": "follow"}, 5) for _ in range(QUICK.clients // 2)]
    for follower in followers:
        next(follower)
    with pytest.raises(Refused, match="busy: 2 clients are following"):
        client.call(server.path, {"command": "follow"}, 5)
    assert client.call(server.path, {"command": "echo"}, 5) == {}
    for follower in followers:
        follower.close()


def test_one_client_too_many_is_told_so(instance: Instance, desk: Desk) -> None:
    patient = Limits(clients=2, request=20, close=0.3)
    with (
        ControlServer(instance, desk, limits=patient) as server,
        raw(server.path),
        raw(server.path),
        pytest.raises(Refused, match="busy: 2 clients"),
    ):
        client.call(server.path, {"command": "echo"}, 5)


def test_a_client_that_does_not_read_is_dropped(instance: Instance) -> None:
    ended = threading.Event()

    def flood(_request: Request) -> Iterator[str]:
        try:
            while True:
                yield "x" * 100_000
        finally:
            ended.set()

    limits = Limits(clients=2, send=0.2, close=0.3)
    with ControlServer(instance, flood, limits=limits) as server, raw(server.path) as connection:
        connection.sendall(b'{"command":"flood"}\n')
        assert ended.wait(20)


def test_closing_lets_a_reply_on_its_way_out(instance: Instance, desk: Desk) -> None:
    server = ControlServer(instance, desk, limits=Limits(close=20))
    server.start()
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(client.call(server.path, {"command": "wait"}, 20)))
    waiting.start()
    assert desk.entered.wait(20)
    idle = raw(server.path)
    idle.sendall(b'{"command":"echo"}\n')
    assert idle.recv(100)
    closing_thread = threading.Thread(target=server.close)
    closing_thread.start()
    with idle:  # the server closes it, and has by then seen to the earlier one
        assert idle.recv(100) == b""
    desk.release.set()
    closing_thread.join()
    waiting.join()
    assert answers == ["waited"]
    assert not server.path.exists()


def test_closing_does_not_wait_for_ever_for_a_handler_that_hangs(instance: Instance, desk: Desk) -> None:
    with ControlServer(instance, desk, limits=QUICK) as server:
        connection = raw(server.path)
        connection.sendall(b'{"command":"wait"}\n')
        assert desk.entered.wait(20)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    connection.close()


def test_strangers_are_refused_by_the_kernels_word(instance: Instance, desk: Desk) -> None:
    stranger = Peer(4711, os.geteuid() + 1 or 1)
    with (
        ControlServer(instance, desk, peer_of=lambda _: stranger) as server,
        pytest.raises(Refused, match="only root"),
    ):
        client.call(server.path, {"command": "echo"}, 5)
    assert desk.peers == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_is_refused_even_when_the_modes_let_him_in(desk: Desk) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, Instance(Path(folder)) as instance:
        Path(folder).chmod(0o755)
        with ControlServer(instance, desk) as server:
            server.path.chmod(0o666)
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:  # no pytest, no cleanup in here
                os.setgroups([])
                os.setresuid(65534, 65534, 65534)
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.connect(str(server.path))
                os.write(writer, connection.recv(65536))
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader, "rb") as answer:
                text = answer.read()
            assert os.waitpid(child, 0)[1] == 0
    assert b"only root may ask nodewalld" in text
    assert desk.peers == []


def test_the_client_trusts_no_strangers_socket(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "peer_of", lambda _: Peer(1, os.geteuid() + 1))
    with pytest.raises(Refused, match="not root's"):
        client.call(server.path, {"command": "echo"}, 5)


def test_without_a_daemon_the_client_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon, match="not running"):
        client.call(tmp_path / "nowhere" / "control.sock", {"command": "status"}, 5)
    dead = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(dead))
    with pytest.raises(NoDaemon):
        client.call(dead, {"command": "status"}, 5)


def test_a_daemon_that_hangs_is_no_missing_daemon(server: ControlServer) -> None:
    with pytest.raises(NoAnswer, match="did not answer within"):
        client.call(server.path, {"command": "wait"}, 0.1)


@pytest.mark.parametrize("answer", [b"nonsense\n", b"[]\n", b""])
def test_an_answer_in_other_words_is_no_answer(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NoAnswer):
            client.call(path, {"command": "status"}, 5)
        thread.join()


def test_a_living_daemons_folder_is_refused_and_its_pid_named(instance: Instance) -> None:
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}") as running:
        Instance(instance.folder)
    assert running.value.pid == os.getpid()


def test_a_dead_daemons_lock_and_socket_are_replaced(tmp_path: Path, desk: Desk) -> None:
    folder = tmp_path / "run"
    child = os.fork()
    if child == 0:  # dies with lock and socket, as after kill -9
        ControlServer(Instance(folder), desk)
        os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "control.sock").is_socket()
    with Instance(folder) as instance, ControlServer(instance, desk) as server:
        assert client.call(server.path, {"command": "echo"}, 5) == {}


def test_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Instance(tmp_path).release()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
