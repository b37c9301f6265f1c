"""Faults of forkservers: what is asked of one that cannot answer is an error in time.

One that is killed, and malformed requests, are in tests/process.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import bodies
from harness.faults import fault
from harness.processes import (
    Background,
    Mailbox,
    Slot,
    Word,
    settle,
    survivors,
    wait_gone,
    wait_status,
)
from isolated_tasks.errors import ForkserverError
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

#: A child hangs at its birth while there is such a file: in a handler of fork, or as it loads.
STUCK = """
import os, time
def hang():
    if os.path.exists({path!r}):
        with open({path!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        time.sleep(1000)
os.register_at_fork(after_in_child=hang)
def set_up(argument):
    hang()
"""


@fault(42)
def test_a_child_that_is_stuck_at_its_birth_is_an_error_in_time_and_goes(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    path = tmp_path / "stuck"
    (tmp_path / "sticky.py").write_text(STUCK.format(path=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["harness.bodies"], setup="sticky:set_up", setup_name="the app")
    slot = make_slot(address=launcher.address, start_method=start_method, start_timeout=1.5)
    patient = make_slot(address=launcher.address, start_method=start_method)
    path.touch()

    with pytest.raises(ForkserverError, match=r"has not come to accept .* within 1\.5 s") as caught:
        slot.run(abs, -1)
    assert caught.value.pid is not None

    assert survivors(map(int, path.read_text().split())) == set()
    path.unlink()
    assert patient.run(bodies.siblings) == 1
    launcher.check()
    assert patient.run(os.getppid) == launcher.pids()[0]


@fault(43)
def test_a_forkserver_that_is_stopped_is_an_error_in_time_and_no_child_later(
    new_launcher: NewLauncher, make_slot: MakeSlot, tmp_path: Path, start_method: str
) -> None:
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.bodies"])
    (pid,) = launcher.pids()
    slot = make_slot(address=launcher.address, start_method=start_method, start_timeout=0.2)
    os.kill(pid, signal.SIGSTOP)
    wait_status(pid, psutil.STATUS_STOPPED)

    with pytest.raises(
        ForkserverError, match=r"no child was started within 0\.2 s .* is busy, stopped"
    ):
        slot.run(bodies.append, str(traces), "begun")

    os.kill(pid, signal.SIGCONT)
    # It was asked first, so that a child for that request would be there before this one.
    assert make_slot(address=launcher.address).run(bodies.siblings) == 1
    assert not traces.exists()


@fault(43)
def test_a_forkserver_that_stays_stopped_is_replaced_and_no_call_is_lost(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    tmp_path: Path,
    start_method: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.bodies"], patience=0.5)
    (pid,) = launcher.pids()
    slot = make_slot(address=launcher.address, start_method=start_method)
    tick = threading.Event()
    os.kill(pid, signal.SIGSTOP)
    wait_status(pid, psutil.STATUS_STOPPED)

    with Background(slot.run, bodies.append, str(traces), "once") as call:
        while launcher.pids() in ([pid], []):
            launcher.check()
            tick.wait(0.05)
        call.result()

    wait_gone([pid])
    assert f"forkserver pid={pid} has not answered for 0.5 s, and is killed" in caplog.text
    assert traces.read_text() == "once\n"


def test_a_forkserver_that_answers_is_left_alone(new_launcher: NewLauncher) -> None:
    launcher = new_launcher(patience=0.2)
    (pid,) = launcher.pids()
    tick = threading.Event()
    until = time.monotonic() + 1

    while time.monotonic() < until:
        launcher.check()
        tick.wait(0.02)

    assert launcher.pids() == [pid]


@fault(43)
def test_a_forkserver_that_is_stopped_during_a_call_delays_nothing_but_its_end(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    start_method: str,
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address, start_method=start_method)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        os.kill(forkserver, signal.SIGSTOP)
        wait_status(forkserver, psutil.STATUS_STOPPED)
        word.give("done")

        assert call.result() == (pid, "done")

    os.kill(forkserver, signal.SIGCONT)
    slot.close()
    assert survivors([pid], timeout=0) == set()


@fault(39)
def test_a_forkserver_that_is_killed_while_requests_wait_loses_none(
    *, new_launcher: NewLauncher, make_slot: MakeSlot, tmp_path: Path, start_method: str
) -> None:
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.bodies"])
    (pid,) = launcher.pids()
    slot = make_slot(address=launcher.address, start_method=start_method, slots=3)
    os.kill(pid, signal.SIGSTOP)
    wait_status(pid, psutil.STATUS_STOPPED)
    calls = [Background(slot.run, bodies.append, str(traces), number) for number in range(3)]

    with calls[0], calls[1], calls[2]:
        os.kill(pid, signal.SIGKILL)
        wait_gone([pid])
        while launcher.pids() == [pid]:
            launcher.check()

        assert len({call.result() for call in calls}) == 3

    assert sorted(traces.read_text().split()) == ["0", "1", "2"]


#: Where all that is written is too much.
FULL = """
import os
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
"""


@fault(23, 40)
def test_a_forkserver_that_cannot_say_what_is_wrong_goes_on(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    (tmp_path / "full.py").write_text(FULL)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["full", "harness.bodies"])
    (pid,) = launcher.pids()

    # What it complains of.
    settle(launcher)

    launcher.check()
    assert launcher.pids() == [pid]
    slot = make_slot(address=launcher.address, start_method=start_method)
    assert slot.run(bodies.say, "", "more than there is room for") is None


# ── preloads ────────────────────────────────────────────────────────────────────────────────────


@fault(41)
def test_a_preload_that_leaves_a_connection_is_named(
    *,
    new_launcher: NewLauncher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        source = f"import socket\nconnection = socket.create_connection({address!r})\n"
        (tmp_path / "connected.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

        new_launcher(preload=["json", "connected", "decimal"])

    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "loading connected left 1 socket(s) open (127.0.0.1:" in record.getMessage()
    assert f" to 127.0.0.1:{address[1]})" in record.getMessage()
