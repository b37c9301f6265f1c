"""What outlives what it belonged to is found, and told from what may."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness import marks
from harness.app import Settings
from harness.processes import survivors
from soak.kinds import CHILD_VARIABLE, start_time
from soak.members import Member, census, children_of
from soak.orphans import Orphans

Start = Callable[..., psutil.Process]

#: Shorter than that of a soak: nothing here has to end anything in time.
ORPHAN_SECONDS = 0.2


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soak.orphans.ORPHAN_SECONDS", ORPHAN_SECONDS)


@pytest.fixture
def member(tmp_path: Path) -> Member:
    """A place whose worker nobody starts."""
    member = Member(
        "redis",
        pool="prefork",
        settings=Settings(broker_url="", result_backend="", name="none"),
        folder=tmp_path,
        path=os.devnull,
        environment={},
    )
    member.mark = f"test-{os.urandom(6).hex()}"
    return member


@pytest.fixture
def start(member: Member) -> Iterator[Start]:
    """Starts processes that bear the worker's mark, and sleep."""
    started = []

    def start(**environment: str) -> psutil.Process:
        process = subprocess.Popen(
            ["sleep", "100"],
            env={**os.environ, marks.VARIABLE: member.mark, **environment},
            start_new_session=True,
        )
        started.append(process)
        found = psutil.Process(process.pid)
        # Nobody is told when the kernel has put the new environment in its place.
        while marks.VARIABLE not in found.environ():
            time.sleep(0.005)
        return found

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def child(start: Start) -> psutil.Process:
    return start()


def identity(process: psutil.Process) -> str:
    return f"{process.pid}:{start_time(process.pid)}"


def end(process: psutil.Process) -> None:
    process.kill()
    assert survivors([process.pid]) == set()


def look(orphans: Orphans, member: Member, **options: object) -> None:
    """Look twice, with time enough in between to be gone."""
    orphans.look_for_bereaved([member], **options)  # type: ignore[arg-type]
    time.sleep(ORPHAN_SECONDS + 0.1)  # that nothing happens in it is the point
    orphans.look_for_bereaved([member], **options)  # type: ignore[arg-type]


def test_what_outlives_its_child_is_an_orphan_and_is_ended(
    member: Member, start: Start, child: psutil.Process
) -> None:
    left = start(**{CHILD_VARIABLE: identity(child)})
    orphans = Orphans()
    look(orphans, member)
    assert orphans.found == []
    end(child)

    look(orphans, member)

    (orphan,) = orphans.found
    assert str(left.pid) in orphan.description
    assert orphan.age > ORPHAN_SECONDS
    assert survivors([left.pid]) == set()


def test_what_goes_in_time_is_none(member: Member, start: Start, child: psutil.Process) -> None:
    left = start(**{CHILD_VARIABLE: identity(child)})
    orphans = Orphans()
    end(child)
    orphans.look_for_bereaved([member])
    end(left)
    time.sleep(ORPHAN_SECONDS + 0.1)

    orphans.look_for_bereaved([member])

    assert orphans.found == []


def test_the_time_begins_when_the_forkserver_can_act(
    member: Member, start: Start, child: psutil.Process
) -> None:
    start(**{CHILD_VARIABLE: identity(child)})
    orphans = Orphans()
    end(child)

    look(orphans, member, awake_since=lambda mark: time.monotonic())

    assert orphans.found == []


def test_what_outlives_its_worker_is_an_orphan(member: Member, start: Start) -> None:
    left = start()
    orphans = Orphans()

    orphans.look_at("a worker", marks.marked_processes(member.mark), 1.0)

    assert [str(left.pid) in one.description for one in orphans.found] == [True]


@pytest.mark.parametrize(("killed", "lost_forkserver"), [(True, True), (True, False)])
def test_nobody_finds_the_daemon_of_a_killed_child_without_a_forkserver(
    *, member: Member, start: Start, child: psutil.Process, killed: bool, lost_forkserver: bool
) -> None:
    start(**{CHILD_VARIABLE: identity(child)})
    orphans = Orphans()
    if killed:
        orphans.note_killed([child])
    if lost_forkserver:
        # This process is its parent.
        orphans.note_without_forkserver(psutil.Process())
    end(child)

    look(orphans, member)

    assert (len(orphans.found), orphans.escaped) == ((0, 1) if lost_forkserver else (1, 0))


def test_processes_are_told_apart_by_mark_and_kind(member: Member, start: Start) -> None:
    process = start()

    families = census([member])

    assert families[member.mark].by_role["grandchild"] == [process]
    assert families[member.mark].all() == [process]


def test_the_children_of_a_requester_are_those_it_holds_a_pidfd_of(child: psutil.Process) -> None:
    pidfd = os.pidfd_open(child.pid)
    try:
        assert child in children_of(os.getpid())
    finally:
        os.close(pidfd)
    assert child not in children_of(os.getpid())
