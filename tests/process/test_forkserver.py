"""The forkserver: whatever one requester does, the others do not notice."""

import contextlib
import json
import os
import resource
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies
from harness.processes import (
    PATIENCE,
    Background,
    Mailbox,
    Slot,
    Word,
    program,
    settle,
    survivors,
    wait_connected,
    wait_status,
)
from harness.stranger import request
from isolated_tasks.errors import ChildLostError
from isolated_tasks.process import child, pickling, protocol, system
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.protocol import HEADER, Kind, Message

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


class Requester:
    """A connection to a forkserver that says what the test wants it to."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)
        self.socket.settimeout(PATIENCE)
        # What a request comes with: call socket, lifeline, crash file, stderr.
        self.call, theirs = socket.socketpair()
        self._lifeline, writer = os.pipe()
        self.descriptors = [theirs.detach(), self._lifeline, writer, os.dup(2)]

    def send(self, data: bytes | Message, descriptors: Sequence[int] = ()) -> None:
        if not isinstance(data, bytes):
            data = b"".join(bytes(piece) for piece in protocol.encode(data))
        with contextlib.suppress(ConnectionError):  # it may have closed the door already
            sent = socket.send_fds(self.socket, [data], descriptors)
            self.socket.sendall(data[sent:])

    def is_closed(self) -> bool:
        """Wait until the forkserver closes the connection."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def answer(self, expected: Kind) -> dict[str, Any]:
        """What the next message says, which is of that kind."""
        head = self.socket.recv(HEADER.size, socket.MSG_WAITALL)
        _, _, kind, _, _, length = HEADER.unpack(head)
        assert kind == expected
        answer: dict[str, Any] = json.loads(self.socket.recv(length, socket.MSG_WAITALL))
        return answer

    def close(self) -> None:
        self.socket.close()
        self.call.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"])


@pytest.fixture
def requester(launcher: Launcher) -> Iterator[Requester]:
    requester = Requester(launcher.address)
    yield requester
    requester.close()


@pytest.fixture
def innocents(launcher: Launcher, make_slot: MakeSlot) -> Iterator[None]:
    """Two requesters, one of them between two calls of a batch, that must not notice anything."""
    batch = make_slot(address=launcher.address, batch_size=2, batch_idle_timeout=1000)
    pid = batch.run(os.getpid)
    forkservers = launcher.pids()
    yield
    assert batch.run(os.getpid) == pid
    assert make_slot(address=launcher.address).run(abs, -1) == 1
    launcher.check()
    assert launcher.pids() == forkservers


def is_readable(connection: socket.socket) -> bool:
    return bool(system.wait_for(connection.fileno(), timeout=0))


def frame(kind: Kind, body: bytes | object, **header: int) -> bytes:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    values = {"flags": 0, "buffers": 0, "length": len(body), "version": protocol.VERSION, **header}
    return (
        HEADER.pack(
            *(protocol.MAGIC, values["version"], kind, values["flags"]),
            *(values["buffers"], values["length"]),
        )
        + body
    )


# ── the process ─────────────────────────────────────────────────────────────────────────────────


def test_the_forkserver_has_one_thread_and_leads_a_session_without_a_terminal(
    launcher: Launcher,
) -> None:
    (pid,) = launcher.pids()
    process = psutil.Process(pid)

    assert process.num_threads() == 1
    assert os.getsid(pid) == pid
    assert process.terminal() is None


def test_the_socket_is_in_a_directory_for_its_owner_alone(launcher: Launcher) -> None:
    directory = os.path.dirname(launcher.address)

    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert os.listdir(directory) == [os.path.basename(launcher.address)]


@pytest.mark.usefixtures("innocents")
def test_signals_of_terminals_and_groups_do_not_end_the_forkserver(launcher: Launcher) -> None:
    (pid,) = launcher.pids()

    for number in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE"):
        os.kill(pid, getattr(signal, number))


def test_the_forkserver_holds_no_descriptors_of_the_main_process(
    new_launcher: NewLauncher, tmp_path: Path
) -> None:
    with (tmp_path / "ours").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        launcher = new_launcher()
        (pid,) = launcher.pids()
    # Once it is in its loop: it looks around before that.
    settle(launcher)

    targets = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    assert str(tmp_path / "ours") not in targets
    assert len(targets) > 3


@pytest.mark.fault(51)
def test_descriptors_do_not_pile_up(launcher: Launcher, make_slot: MakeSlot) -> None:
    (pid,) = launcher.pids()
    slot = make_slot(address=launcher.address)
    counts = []

    for _ in range(3):
        for _ in range(5):
            slot.run(abs, -1)
            with pytest.raises(ChildLostError):
                slot.run(bodies.leave, 1)
        slot.close()
        settle(launcher)
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))

    assert len(set(counts)) == 1


# ── malformed requests ──────────────────────────────────────────────────────────────────────────

SPAWN = vars(request())

MALFORMED = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(100),
    "another version": frame(Kind.SPAWN, SPAWN, version=9),
    "an unknown kind": frame(200, SPAWN),  # type: ignore[arg-type]
    "a body beyond the limit": frame(Kind.SPAWN, b"", length=1 << 40),
    "buffers": frame(Kind.SPAWN, SPAWN, buffers=5),
    "no JSON": frame(Kind.SPAWN, b"\x80\x05."),
    "endless JSON": frame(Kind.SPAWN, b"[" * 1_000_000),
    "a list": frame(Kind.SPAWN, []),
    "too little": frame(Kind.SPAWN, {"name": "x"}),
    "too much": frame(Kind.SPAWN, {**SPAWN, "more": 1}),
    "an environment of numbers": frame(
        Kind.SPAWN, {**SPAWN, "env": {"A": 1}, "start_method": "spawn"}
    ),
    "an environment that is none": frame(Kind.SPAWN, {**SPAWN, "env": [], "start_method": "spawn"}),
    "a memory limit of thousands of digits": frame(
        Kind.SPAWN, {**SPAWN, "memory_limit_bytes": 10**4000}
    ),
    "a signal with a name": frame(Kind.SIGNAL, {"signal": "KILL"}),
    "an outcome": frame(Kind.OUTCOME, b"pickle"),
    "what only a forkserver says": frame(Kind.STARTED, {"pid": 1}),
    "a boot": frame(Kind.BOOT, {}),
}


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_ends_its_own_connection(requester: Requester, data: bytes) -> None:
    requester.send(data, requester.descriptors)

    assert requester.is_closed()


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 50])
def test_a_request_with_another_number_of_descriptors_ends_its_own_connection(
    requester: Requester, launcher: Launcher, count: int
) -> None:
    (pid,) = launcher.pids()
    settle(launcher)
    before = os.listdir(f"/proc/{pid}/fd")

    requester.send(request(), (requester.descriptors * 20)[:count])

    assert requester.is_closed()
    settle(launcher)
    # None has stayed there. The connection's own was among them.
    assert len(os.listdir(f"/proc/{pid}/fd")) == len(before) - 1


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
def test_a_second_request_on_a_connection_ends_it_and_the_child(
    requester: Requester,
) -> None:
    requester.send(request(), requester.descriptors)
    pid = requester.answer(Kind.STARTED)["pid"]

    requester.send(request(), requester.descriptors)

    assert requester.is_closed()
    assert survivors([pid]) == set()


@pytest.mark.usefixtures("innocents")
@pytest.mark.parametrize("name", ["A\0B", "A=B", "\ud800"], ids=ascii)
def test_an_environment_that_nobody_can_set_is_refused(requester: Requester, name: str) -> None:
    requester.send(request(start_method="spawn", env={name: "1"}), requester.descriptors)

    assert requester.answer(Kind.REFUSED)["errno"] is None


@pytest.mark.usefixtures("innocents")
def test_a_signal_before_there_is_a_child_is_nothing(requester: Requester) -> None:
    requester.send(protocol.Signal(9))
    requester.send(request(), requester.descriptors)

    assert requester.answer(Kind.STARTED)["pid"] > 0


@pytest.mark.usefixtures("innocents")
@pytest.mark.parametrize("number", [-1, 0, 10_000, 2**40])
def test_a_signal_that_does_not_exist_ends_its_own_connection(
    requester: Requester, number: int
) -> None:
    requester.send(request(), requester.descriptors)
    requester.answer(Kind.STARTED)

    requester.send(protocol.Signal(number))

    assert requester.is_closed()


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
def test_descriptors_that_are_something_else_harm_the_child_alone(requester: Requester) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    requester.send(request(), [null] * protocol.SPAWN_DESCRIPTORS)
    os.close(null)

    requester.answer(Kind.STARTED)
    assert requester.answer(Kind.EXITED)["exit_code"] != 0


# ── requesters that go away ─────────────────────────────────────────────────────────────────────


@pytest.mark.fault(30)
def test_a_child_whose_lifeline_is_cut_before_it_is_born_does_not_live(
    requester: Requester,
) -> None:
    # As if its requester had died just now, the control socket held open by somebody else.
    call, _, crash, stderr = requester.descriptors
    reader, writer = os.pipe()
    os.close(writer)

    requester.send(request(), [call, reader, crash, stderr])

    requester.answer(Kind.STARTED)
    assert requester.answer(Kind.EXITED)["exit_code"] == child.ExitCode.ORPHANED
    os.close(reader)


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size, 50])
def test_a_requester_that_goes_in_the_middle_of_its_request_is_forgotten(
    requester: Requester, length: int
) -> None:
    data = b"".join(bytes(piece) for piece in protocol.encode(request()))
    if length:
        requester.send(data[:length], requester.descriptors)

    requester.close()


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
def test_a_requester_that_says_nothing_holds_nobody_up(
    requester: Requester, launcher: Launcher, make_slot: MakeSlot
) -> None:
    # And neither does one that has said half of it.
    requester.send(HEADER.pack(b"IT", 1, Kind.SPAWN, 0, 0, 100))

    assert make_slot(address=launcher.address).run(abs, -1) == 1


@pytest.mark.usefixtures("innocents")
def test_a_child_goes_with_the_connection_of_its_requester(requester: Requester) -> None:
    # Its lifeline stays open, held by this very process: the forkserver's watch alone ends it.
    requester.send(request(), requester.descriptors)
    pid = requester.answer(Kind.STARTED)["pid"]

    requester.socket.close()

    assert survivors([pid]) == set()


#: Children that are stopped before they do anything.
STOPPED_AT_BIRTH = """
import os, signal
from isolated_tasks.process import child, system
child._be_born = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
system.interpreter = lambda module: ["/bin/sh", "-c", "kill -STOP $$"]
"""


@pytest.mark.fault(30)
def test_a_child_that_has_yet_to_do_anything_goes_with_the_connection_of_its_requester(
    *,
    new_launcher: NewLauncher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    (tmp_path / "stopped_at_birth.py").write_text(STOPPED_AT_BIRTH)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["stopped_at_birth"], serves=False)
    with contextlib.closing(Requester(launcher.address)) as requester:
        requester.send(request(start_method=start_method), requester.descriptors)
        pid = requester.answer(Kind.STARTED)["pid"]
        wait_status(pid, psutil.STATUS_STOPPED)

        # It has not armed its lifeline. The signal goes to the group that it leads, and that is not
        # its own doing.
        requester.socket.close()

        assert survivors([pid]) == set()


@pytest.mark.fault(40)
@pytest.mark.usefixtures("innocents")
def test_a_crowd_of_requesters_that_want_nothing_is_borne(launcher: Launcher) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(launcher.address)


@pytest.mark.fault(38)
def test_out_of_descriptors_requests_wait_until_there_are_some(
    launcher: Launcher, make_slot: MakeSlot
) -> None:
    (pid,) = launcher.pids()
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (24, hard))
    # More than it has descriptors for; the last of them wait, as the request does behind them.
    idle = [socket.socket(socket.AF_UNIX) for _ in range(24)]
    for connection in idle:
        connection.connect(launcher.address)
    slot = make_slot(address=launcher.address)

    with Background(slot.run, abs, -1) as call:
        wait_connected(launcher.address, more_than=len(idle) + 1)
        # It waits, and does not spin: of that there is no event.
        before = sum(psutil.Process(pid).cpu_times()[:2])
        threading.Event().wait(0.3)
        assert sum(psutil.Process(pid).cpu_times()[:2]) - before < 0.15
        for connection in idle:
            connection.close()

        assert call.result() == 1


def test_descriptors_that_come_with_half_a_request_leave_room_for_those_of_others(
    launcher: Launcher, make_slot: MakeSlot
) -> None:
    (pid,) = launcher.pids()
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (43, hard))
    with contextlib.ExitStack() as gone:
        # All together they have more than there is room for.
        crowd = [Requester(launcher.address) for _ in range(12)]
        for requester in crowd:
            gone.callback(requester.close)
            requester.send(b"I", requester.descriptors)
        slot = make_slot(address=launcher.address)

        with Background(slot.run, abs, -1) as call, gone:
            # Those that do not fit wait, and so does this one; nobody is turned away.
            wait_connected(launcher.address, more_than=len(crowd) + 1)
            turned_away = [requester for requester in crowd if is_readable(requester.socket)]
            gone.close()

            assert call.result() == 1
    assert turned_away == []


# ── other users ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    ("uid", "is_open", "answer"),
    [(0, False, "Started"), (65534, False, "PermissionError"), (65534, True, "closed")],
)
def test_another_user_is_kept_out_by_the_directory_and_by_the_forkserver(
    *, launcher: Launcher, uid: int, is_open: bool, answer: str
) -> None:
    if is_open:
        os.chmod(tempfile.gettempdir(), 0o755)
        os.chmod(os.path.dirname(launcher.address), 0o755)
        os.chmod(launcher.address, 0o777)

    with program("harness.stranger", launcher.address, str(uid)) as stranger:
        assert stranger.communicate(timeout=PATIENCE)[0].strip() == answer


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


def test_stopping_leaves_no_process_and_no_file(
    launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address, slots=3)
    idle = slot.outcome(make_slot(batch_size=9).options, os.getpid).result()
    with Background(slot.run, bodies.hang, mailbox.path, "asleep") as call:
        pids = mailbox.read()

        launcher.stop()

        with pytest.raises(ChildLostError) as caught:
            call.result()
    assert caught.value.pid == pids[0]
    assert survivors([forkserver, idle, *pids]) == set()
    assert not os.path.exists(os.path.dirname(launcher.address))
    assert launcher.pids() == []


def test_stopping_twice_is_fine(launcher: Launcher) -> None:
    launcher.stop()
    launcher.stop()

    assert launcher.check() is None


def test_stopping_a_forkserver_that_is_stopped_by_a_signal_kills_it(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pid,) = launcher.pids()
    os.kill(pid, signal.SIGSTOP)
    wait_status(pid, psutil.STATUS_STOPPED)
    monkeypatch.setattr("isolated_tasks.process.generation.STOP_TIMEOUT", 0.1)

    launcher.stop()

    assert survivors([pid], timeout=0) == set()
    assert not os.path.exists(os.path.dirname(launcher.address))


# ── several ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(43)
def test_several_forkservers_take_from_one_queue(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    launcher = new_launcher(preload=["harness.bodies"], count=2)
    assert len(set(launcher.pids())) == len(launcher.loaded()) == 2
    one, two = launcher.pids()

    # Each alone, the other one standing still.
    for stopped, works in ((one, two), (two, one)):
        os.kill(stopped, signal.SIGSTOP)
        wait_status(stopped, psutil.STATUS_STOPPED)
        assert make_slot(address=launcher.address).run(os.getppid) == works
        os.kill(stopped, signal.SIGCONT)


def test_while_one_of_several_forkservers_is_dead_the_others_serve(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    launcher = new_launcher(preload=["harness.bodies"], count=2)
    one, two = launcher.pids()
    os.kill(one, signal.SIGKILL)
    slot = make_slot(address=launcher.address)

    assert {slot.run(os.getppid) for _ in range(5)} == {two}


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


def test_a_forkserver_that_ends_does_not_mind_requesters_that_are_gone(
    capfd: pytest.CaptureFixture[str], new_launcher: NewLauncher
) -> None:
    # Not by a fixture: what that starts writes elsewhere.
    launcher = new_launcher(preload=["harness.bodies"])
    with contextlib.closing(Requester(launcher.address)) as requester:
        requester.send(request(), requester.descriptors)
        pid = requester.answer(Kind.STARTED)["pid"]
        # It hears of this when it tells of the end of the child, which is its own doing.
        requester.socket.shutdown(socket.SHUT_RD)

        launcher.stop()

    assert survivors([pid]) == set()
    assert capfd.readouterr().err == ""


def test_a_child_whose_requester_is_gone_goes_without_a_word(
    capfd: pytest.CaptureFixture[str], new_launcher: NewLauncher, mailbox: Mailbox, word: Word
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    body = pickling.dumps((bodies.report_and_wait, (mailbox.path, word.path), {}))
    with contextlib.closing(Requester(launcher.address)) as requester:
        requester.send(request(), requester.descriptors)
        requester.answer(Kind.STARTED)
        for piece in protocol.encode(protocol.Call(body.body, body.buffers)):
            requester.call.sendall(piece)
        mailbox.read()
        # What the kernel does first, and before it cuts the lifeline, for one that is killed.
        requester.call.close()
        word.give()

        assert requester.answer(Kind.EXITED)["exit_code"] == child.ExitCode.ORPHANED
    launcher.stop()
    assert capfd.readouterr().err == ""
