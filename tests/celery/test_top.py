"""``celery isolated top``: once, as JSON, and in a terminal."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.processes import PATIENCE, Mailbox, Word, stopped
from harness.watching import celery, command, environment
from harness.worker import Worker

StartWorker = Callable[..., Worker]
#: The class is in conftest.py, which nothing can import.
Workplace = Any

TIMEOUT = 30

#: What celery exits with where nobody answers (sysexits.h, EX_UNAVAILABLE).
UNAVAILABLE = 69
#: What click exits with where it is called wrongly.
USAGE = 2


class Two:
    """Two workers on one Redis; each runs a body that waits: the larger one in the second."""

    def __init__(self, worker: StartWorker, mailbox: Mailbox, folder: Path) -> None:
        self.workers = [worker("seen", pool=pool) for pool in ("prefork", "threads")]
        self._words = [Word(folder), Word(folder)]
        self.results = []
        self.pids = []
        for size, word in zip((1, 50), self._words, strict=True):
            # One slot each: the second goes to the other one.
            self.results.append(
                self.workers[0].call("seen.hold_and_wait", size << 20, mailbox.path, word.path)
            )
            self.pids.append(mailbox.read()[0])

    def finish(self) -> None:
        for result, word in zip(self.results, self._words, strict=True):
            word.give()
            result.get(timeout=TIMEOUT)


@pytest.fixture
def two(worker: StartWorker, mailbox: Mailbox, tmp_path: Path) -> Iterator[Two]:
    two = Two(worker, mailbox, tmp_path)
    yield two
    two.finish()


def test_once_shows_the_children_of_two_workers_the_largest_first(
    two: Two, workplace: Workplace
) -> None:
    run = celery(workplace, "seen", "isolated", "top", "--once")

    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    heads = [line for line in lines if line.startswith("worker-")]
    assert {line.split()[0] for line in heads} == {one.name for one in two.workers}
    forkservers = [line for line in lines if line.startswith("  forkserver pid")]
    assert len(forkservers) == 2
    assert all("serving" in line and "1 starts  0 failures" in line for line in forkservers)
    rows = [line.split() for line in lines[lines.index(next(filter(is_header, lines))) + 1 :]]
    assert len(rows) == 2
    # The larger one is the second.
    for row, pid, result in zip(rows, two.pids[::-1], two.results[::-1], strict=True):
        assert {str(pid), "running", "seen.hold_and_wait", result.id} <= {*row}
    assert int(rows[0][0]) > int(rows[1][0]) + 40


def is_header(line: str) -> bool:
    return line.split()[:3] == ["RSS", "LIMIT", "AGE"]


def test_json_needs_no_rich_and_the_view_says_what_it_needs(
    two: Two, workplace: Workplace, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "rich.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')"
    )
    workplace.path.insert(0, missing)

    run = celery(workplace, "seen", "isolated", "top", "--json")

    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert answers.keys() == {one.name for one in two.workers}
    children = {child["pid"]: child for a in answers.values() for child in a["children"]}
    assert [children[pid]["id"] for pid in two.pids] == [result.id for result in two.results]

    run = celery(workplace, "seen", "isolated", "top", "--once")
    assert run.returncode == 1
    assert run.stdout == ""
    assert last_line(run) == (
        "Error: the view needs rich: pip install 'isolated-tasks[cli]'; --json does without"
    )


def last_line(run: "subprocess.CompletedProcess[str]") -> str:
    return run.stderr.strip().splitlines()[-1]


def test_one_worker_of_several_by_its_name(two: Two, workplace: Workplace) -> None:
    name = two.workers[1].name

    run = celery(workplace, "seen", "isolated", "top", "--json", "--destination", name)

    assert json.loads(run.stdout).keys() == {name}


def test_a_worker_that_is_not_there_is_one_clear_error(
    worker: StartWorker, workplace: Workplace
) -> None:
    name = worker("seen").name
    arguments = ["--destination", f"nobody@nowhere,{name}", "--timeout", "3"]
    expected = f"Error: no worker nobody@nowhere answers within 3 s (--timeout); there are {name}"

    for form in ("--json", "--once"):
        run = celery(workplace, "seen", "isolated", "top", form, *arguments)
        assert (run.returncode, run.stdout) == (UNAVAILABLE, "")
        assert last_line(run) == expected
        assert "Traceback" not in run.stderr


def test_no_worker_at_all_is_one_clear_error(workplace: Workplace) -> None:
    run = celery(workplace, "seen", "isolated", "top", "--json", "--timeout", "0.5")

    assert (run.returncode, run.stdout) == (UNAVAILABLE, "")
    assert last_line(run) == "Error: no worker answers within 0.5 s (--timeout)"


@pytest.mark.parametrize("option", ["--interval", "--timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_one_clear_error(
    workplace: Workplace, option: str, value: str
) -> None:
    run = celery(workplace, "seen", "isolated", "top", "--json", option, value)

    assert (run.returncode, run.stdout) == (USAGE, "")
    assert last_line(run).startswith(f"Error: Invalid value for '-{option[2]}' / '{option}': ")


def test_without_a_terminal_the_view_says_what_to_use(workplace: Workplace) -> None:
    run = celery(workplace, "seen", "isolated", "top")

    assert (run.returncode, run.stdout) == (USAGE, "")
    assert last_line(run) == "Error: this is no terminal: use --once or --json"


# ── in a terminal ───────────────────────────────────────────────────────────────────────────────


class Terminal:
    """A terminal with a program in it, and a person before it."""

    def __init__(self, program: list[str], env: dict[str, str], folder: Path) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 250, 0, 0))
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            program,
            env={**env, "TERM": "xterm"},
            cwd=folder,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
            # So that Ctrl-C in it is a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.shown = b""

    def wait_for(self, *texts: str) -> None:
        """Wait until all of them have been shown since the last time."""
        while not all(text.encode() in self.shown for text in texts):
            ready, _, _ = select.select([self._ours], [], [], PATIENCE)
            assert ready, self.shown.decode()
            self.shown += os.read(self._ours, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def end(self) -> int:
        """Read what is left, and return the exit code."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while True:
                ready, _, _ = select.select([self._ours, pidfd], [], [], PATIENCE)
                assert ready, "it does not end"
                if self._ours not in ready:
                    return self.process.wait()
                self.shown += os.read(self._ours, 65536)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(workplace: Workplace) -> Iterator[Callable[..., Terminal]]:
    terminals = []

    def open_one(*arguments: str) -> Terminal:
        program = command("seen", "isolated", "top", *arguments)
        env = environment(workplace, {})
        # The terminal's own width.
        del env["COLUMNS"]
        terminals.append(Terminal(program, env, workplace.folder))
        return terminals[-1]

    yield open_one
    for one in terminals:
        one.close()


@pytest.mark.parametrize("key", [b"q", b"Q", b"\x03"], ids=["q", "Q", "Ctrl-C"])
def test_the_view_shows_what_runs_until_a_key_ends_it(
    two: Two, terminal: Callable[..., Terminal], key: bytes
) -> None:
    screen = terminal("--interval", "0.2", "--timeout", "1")
    expected = [*(result.id for result in two.results), "q quits"]
    screen.wait_for(*expected)
    # It looks again by itself.
    screen.shown = b""
    screen.wait_for(*expected)

    screen.type(key)

    assert screen.end() == 0
    # The terminal is as it was: its other screen left, its settings put back.
    assert screen.shown.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?1049l" in screen.shown
    assert termios.tcgetattr(screen.theirs) == screen.before
    assert b"Traceback" not in screen.shown


def test_the_view_says_which_worker_does_not_answer_any_more(
    two: Two, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal("--interval", "0.2", "--timeout", "1")
    screen.wait_for(*(result.id for result in two.results))

    with stopped(two.workers[0].pid):
        screen.shown = b""
        screen.wait_for(f"no answer from {two.workers[0].name}", two.results[1].id)

    screen.shown = b""
    screen.wait_for(two.results[0].id)
    screen.type(b"q")
    assert screen.end() == 0


def test_what_is_wrong_from_the_beginning_is_said_on_the_terminal_as_it_is(
    worker: StartWorker, terminal: Callable[..., Terminal]
) -> None:
    worker("seen")
    screen = terminal("--destination", "nobody@nowhere")

    assert screen.end() == UNAVAILABLE
    assert b"Error: no worker nobody@nowhere answers" in screen.shown
    assert b"\x1b[?1049h" not in screen.shown
