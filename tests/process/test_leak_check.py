"""The check that each test here goes through, tested itself."""

import os
import random
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import leaks, marks
from harness.leaks import Snapshot
from harness.processes import wait_status

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture(autouse=True)
def impatience(nothing_leaks: None) -> Iterator[None]:
    """What is left here will not go by itself."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(leaks, "GRACE", 0.1)
        yield


@pytest.fixture
def before(tmp_path: Path) -> Snapshot:
    mark = os.environ[marks.VARIABLE]
    return Snapshot.take(mark=mark, folders=[tmp_path], servers=[os.getpid()])


def test_a_tidy_test_has_no_leaks(before: Snapshot, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]), (tmp_path / "file").open("w"):
        pass
    (tmp_path / "file").unlink()

    assert before.leaks() == []


def test_an_open_descriptor_is_named_with_what_it_is(before: Snapshot) -> None:
    reader, writer = os.pipe()
    try:
        found = before.leaks()
    finally:
        os.close(reader)
        os.close(writer)

    assert [line.split(":")[0] for line in found] == [
        f"descriptor {reader} -> pipe",
        f"descriptor {writer} -> pipe",
        f"forkserver {os.getpid()} has 2 more of pipe",
    ]


def test_a_descriptor_number_that_means_another_file_now_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fd = os.open(first, os.O_CREAT)
    other = os.open(second, os.O_CREAT)
    before = Snapshot.take(mark="unused", folders=[tmp_path])
    os.dup2(other, fd)
    try:
        assert before.leaks() == [f"descriptor {fd} -> {second}"]
    finally:
        os.close(fd)
        os.close(other)


def test_a_file_is_named(before: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "left"
    path.touch()

    assert before.leaks() == [f"file {path}"]


def test_a_forkserver_that_is_gone_is_named(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL) as server:
        before = Snapshot.take(mark="unused", folders=[tmp_path], servers=[server.pid])
        server.kill()

    assert before.leaks() == [f"forkserver {server.pid} is gone"]


def test_a_zombie_is_named_and_reaped(before: Snapshot) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    wait_status(pid, psutil.STATUS_ZOMBIE)

    (leak,) = before.leaks()

    assert leak.startswith(f"zombie process {pid} ")
    assert not psutil.pid_exists(pid)


def test_shared_memory_is_named(before: Snapshot) -> None:
    path = Path("/dev/shm/it-test-" + "".join(random.choices(string.ascii_letters, k=8)))
    path.touch()
    try:
        assert before.leaks() == [f"shared memory {path.name}"]
    finally:
        path.unlink()


def test_shared_memory_with_the_number_of_a_stranger_is_its_own_business(before: Snapshot) -> None:
    path = Path(f"/dev/shm/it-test-{os.getppid()}-{os.urandom(4).hex()}")
    path.touch()
    try:
        assert before.leaks() == []
    finally:
        path.unlink()


#: Maps a file, says so, and stays until its input ends.
MAP = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
    print("mapped", flush=True)
    sys.stdin.read()
"""
#: Starts a process and leaves it, once that has said something; it is nobody's child then.
ORPHAN = """
import subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
process.stdout.readline()
"""


def test_shared_memory_that_a_stranger_has_mapped_is_its_own_business(
    before: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("/dev/shm/it-test-" + "".join(random.choices(string.ascii_letters, k=8)))
    path.write_bytes(bytes(4096))
    monkeypatch.delenv(marks.VARIABLE)
    command = [sys.executable, "-c", ORPHAN, sys.executable, "-c", MAP, str(path)]
    reader, writer = os.pipe()
    try:
        subprocess.run(command, stdin=reader, check=True)

        assert [line for line in before.leaks() if "shared" in line] == []
    finally:
        os.close(writer)
        os.close(reader)
        path.unlink()


def test_a_child_is_named_and_killed(before: Snapshot) -> None:
    with subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL) as child:
        (leak,) = before.leaks()

        assert leak.startswith(f"process {child.pid} ")
        assert "time.sleep(600)" in leak


def test_an_orphan_in_another_session_is_named_and_killed(before: Snapshot) -> None:
    # Its parent ends when it is up: one that is just being made has no environment to look at.
    options = "stdout=s.PIPE, start_new_session=True"
    start = f"import subprocess as s; p = s.Popen({SLEEP!r}, {options}); p.stdout.readline()"
    start += "; print(p.pid)"
    parent = subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, check=True)
    pid = int(parent.stdout.split()[-1])

    (leak,) = before.leaks()

    assert leak.startswith(f"process {pid} ")
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
