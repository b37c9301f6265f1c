"""The check that each test here goes through, tested itself."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness import marks
from harness.leaks import Snapshot

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def before(tmp_path: Path) -> Snapshot:
    return Snapshot.take(mark=os.environ[marks.VARIABLE], folder=tmp_path)


def test_a_tidy_test_has_no_leaks(before: Snapshot, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]), (tmp_path / "file").open("w"):
        pass
    (tmp_path / "file").unlink()

    assert before.leaks() == []


def test_an_open_descriptor_is_named_with_what_it_is(before: Snapshot) -> None:
    reader, writer = os.pipe()
    try:
        leaks = before.leaks()
    finally:
        os.close(reader)
        os.close(writer)

    assert [line.split(":")[0] for line in leaks] == [
        f"descriptor {reader} -> pipe",
        f"descriptor {writer} -> pipe",
    ]


def test_a_descriptor_number_that_means_another_file_now_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fd = os.open(first, os.O_CREAT)
    other = os.open(second, os.O_CREAT)
    before = Snapshot.take(mark="unused", folder=tmp_path)
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
