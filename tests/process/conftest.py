"""Each test of real processes is searched for what it left behind.

Most tests share one forkserver, which has to be there, the same, at the end; a test that could harm
it starts its own.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from harness import marks
from harness.leaks import Snapshot
from harness.processes import PATIENCE, Interrupted, Mailbox, Slot, Word
from isolated_tasks.process.launcher import Launcher, Plan

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


@pytest.fixture(autouse=True)
def nothing_leaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail the test if it leaves an open descriptor, a process or a temporary file.

    Fixtures of a wider scope are set up earlier and are part of what was there before.
    """
    tmp_path_factory.getbasetemp()  # made now, or tmp_path would be made in the folder below
    # Not tmp_path: its name is long, and the path of a Unix socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="it-"))
    mark = f"test-{os.urandom(6).hex()}"
    monkeypatch.setenv(marks.VARIABLE, mark)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = Snapshot.take(mark=mark, folder=folder)
    yield
    leaks = before.leaks()
    shutil.rmtree(folder)
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def forkserver() -> Iterator[Launcher]:
    """A forkserver that no test may harm."""
    launcher = Launcher(Plan(preload=["numpy", "numpy.random", "harness.bodies"]))
    launcher.start()
    launcher.wait_loaded(PATIENCE)
    pids = launcher.pids()
    yield launcher
    launcher.check()
    assert launcher.pids() == pids, "a test has killed the forkserver of all"
    launcher.stop()


@pytest.fixture
def make_slot(forkserver: Launcher) -> Iterator[MakeSlot]:
    """Slots of the common forkserver, closed after the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> Slot:
            slot = Slot(options.pop("address", forkserver.address), **options)
            stack.callback(slot.close)
            return slot

        yield make


@pytest.fixture
def slot(make_slot: MakeSlot) -> Slot:
    """A slot with the default options."""
    return make_slot()


@pytest.fixture
def new_launcher() -> Iterator[NewLauncher]:
    """Forkservers that a test may do anything to; stopped after the test."""
    with ExitStack() as stack:

        def launch(*, wait: bool = True, **plan: Any) -> Launcher:
            launcher = Launcher(Plan(**plan))
            launcher.start()
            stack.callback(launcher.stop)
            if wait:
                launcher.wait_loaded(PATIENCE)
            return launcher

        yield launch


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    mailbox = Mailbox(tmp_path)
    yield mailbox
    mailbox.close()


@pytest.fixture
def word(tmp_path: Path) -> Word:
    return Word(tmp_path)


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Raises `Interrupted` in the main thread."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
