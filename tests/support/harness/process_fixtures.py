"""Fixtures for tests with real children. All that a conftest.py needs for them:

from harness.process_fixtures import *  # noqa: F403

Each test is searched for what it left behind, and each of its slots has to serve one call more.
Most tests share one forkserver, which has to be there, the same, at the end; a test that could harm
it starts its own.
"""

import logging
import os
import queue
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
from harness.fixtures import mailbox, word
from harness.leaks import Snapshot
from harness.processes import PATIENCE, Interrupted, Slot
from isolated_tasks.process.launcher import Launcher, Plan
from isolated_tasks.process.options import ProcessOptions

__all__ = [
    "MakeSlot",
    "NewLauncher",
    "NewLimiter",
    "either",
    "forkserver",
    "forkserver_folder",
    "interrupt",
    "limiter",
    "mailbox",
    "make_slot",
    "new_launcher",
    "new_limiter",
    "nothing_leaks",
    "slot",
    "start_method",
    "waits",
    "word",
]

MakeSlot = Callable[..., Slot]


class NewLauncher:
    """Starts forkservers that a test may do anything to: ``new_launcher(preload=["json"])``."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        #: Those that have to be well after the test, by address.
        self.serving: dict[str, Launcher] = {}

    def __call__(self, *, wait: bool = True, serves: bool = True, **plan: Any) -> Launcher:
        """Start one; it is stopped after the test.

        Args:
            wait: whether to wait until it has loaded.
            serves: whether calls have to work when the test is over.
            **plan: of `Plan`.
        """
        launcher = Launcher(Plan(**plan))
        launcher.start()
        self._stack.callback(launcher.stop)
        if wait:
            launcher.wait_loaded(PATIENCE)
        if serves:
            self.serving[launcher.address] = launcher
        return launcher


@pytest.fixture(autouse=True)
def nothing_leaks(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """Fail the test if it leaves anything behind; see `harness.leaks`.

    Fixtures of a wider scope are set up earlier and are part of what was there before.
    """
    tmp_path_factory.getbasetemp()  # made now, or tmp_path would be made in the folder below
    folder = _short_folder()
    folders, servers = [folder], []
    if "forkserver" in request.fixturenames:
        folders.append(request.getfixturevalue("forkserver_folder"))
        servers = request.getfixturevalue("forkserver").pids()
    mark = f"test-{os.urandom(6).hex()}"
    monkeypatch.setenv(marks.VARIABLE, mark)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = Snapshot.take(mark=mark, folders=folders, servers=servers)
    yield
    leaks = before.leaks()
    shutil.rmtree(folder)
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


def _short_folder() -> Path:
    # Not tmp_path: its name is long, and the path of a Unix socket may have 107 bytes.
    return Path(tempfile.mkdtemp(prefix="it-"))


@pytest.fixture(scope="session")
def forkserver_folder() -> Iterator[Path]:
    """The temporary folder of the forkserver of all, and of its children."""
    folder = _short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def forkserver(forkserver_folder: Path) -> Iterator[Launcher]:
    """A forkserver that no test may harm."""
    launcher = Launcher(Plan(preload=["numpy", "numpy.random", "harness.bodies"]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(forkserver_folder))
        patched.setattr(tempfile, "tempdir", str(forkserver_folder))
        launcher.start()
    launcher.wait_loaded(PATIENCE)
    pids = launcher.pids()
    yield launcher
    launcher.check()
    assert launcher.pids() == pids, "a test has killed the forkserver of all"
    launcher.stop()


@pytest.fixture
def new_launcher() -> Iterator[NewLauncher]:
    """Forkservers that a test may do anything to; one that serves has to do so to the end."""
    with ExitStack() as stack:
        new = NewLauncher(stack)
        yield new
        for launcher in new.serving.values():
            slot = Slot(launcher.address)
            stack.callback(slot.close)
            serve_once_more(slot, launcher)


@pytest.fixture
def make_slot(forkserver: Launcher, new_launcher: NewLauncher) -> Iterator[MakeSlot]:
    """Slots, of the common forkserver or with an ``address``; closed after the test.

    Each has to serve one call more, whatever has happened to it.
    """
    with ExitStack() as stack:
        slots: list[Slot] = []

        def make(**options: Any) -> Slot:
            slot = Slot(options.pop("address", forkserver.address), **options)
            stack.callback(slot.close)
            slots.append(slot)
            return slot

        yield make
        launchers = {**new_launcher.serving, forkserver.address: forkserver}
        for slot in slots:
            if slot.address in launchers:
                serve_once_more(slot, launchers[slot.address])


def serve_once_more(slot: Slot, launcher: Launcher) -> None:
    """See that the next call works, unless the forkserver has been stopped in order."""
    if os.path.exists(launcher.address):
        # As a worker does, which may have lost its forkserver.
        launcher.check()
        launcher.wait_loaded(PATIENCE)
        assert slot.outcome(ProcessOptions("the next call"), abs, -1).result() == 1


@pytest.fixture
def slot(make_slot: MakeSlot) -> Slot:
    """A slot with the default options."""
    return make_slot()


@pytest.fixture(params=["forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """How children are started: a test that asks for it runs once with each."""
    name: str = request.param
    return name


@pytest.fixture
def either(make_slot: MakeSlot, start_method: str) -> Slot:
    """A slot with either start method."""
    return make_slot(start_method=start_method)


#: Switches off what holds memory limits where the kernel lets us.
NO_GROUPS = """
from isolated_tasks.process import cgroup
def find():
    raise cgroup.NoPlaceError("switched off")
cgroup.Delegation.find = find
"""

NewLimiter = Callable[..., Launcher]


@pytest.fixture(params=["by the kernel", "by looking"])
def new_limiter(
    request: pytest.FixtureRequest,
    new_launcher: NewLauncher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> NewLimiter:
    """Starts forkservers, with a preload, that keep memory limits in one of the two ways."""
    (tmp_path / "without_groups.py").write_text(NO_GROUPS)
    monkeypatch.syspath_prepend(tmp_path)

    def launch(*preload: str) -> Launcher:
        if request.param == "by looking":
            return new_launcher(preload=["without_groups", "harness.bodies", *preload])
        launcher = new_launcher(preload=["harness.bodies", *preload])
        if not is_kept_by_the_kernel(launcher):
            pytest.skip("control groups cannot be made here")
        return launcher

    return launch


@pytest.fixture
def limiter(new_limiter: NewLimiter) -> Launcher:
    """One that a test may do anything to."""
    return new_limiter()


def is_kept_by_the_kernel(launcher: Launcher) -> bool:
    """Whether memory limits are."""
    return launcher.loaded()[0].memory_limits.startswith("cgroup")


@pytest.fixture
def waits(caplog: pytest.LogCaptureFixture) -> Iterator["queue.Queue[str]"]:
    """What is logged of calls that wait, as it is logged."""
    lines: queue.Queue[str] = queue.Queue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waits for memory" in record.getMessage():
                lines.put(record.getMessage())

    caplog.set_level(logging.INFO, logger="isolated_tasks")
    logger, handler = logging.getLogger("isolated_tasks"), Handler()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Raises `Interrupted` in the main thread."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
