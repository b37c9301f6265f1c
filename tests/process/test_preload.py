"""What a forkserver loads, and what it says about that."""

import importlib.util
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import isolated_tasks
from harness import bodies
from harness.processes import PATIENCE, Slot, survivors, wait_gone
from isolated_tasks.errors import ForkserverError
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]
MakeModule = Callable[[str, str], None]


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModule:
    """Modules that forkservers can import, and this process too."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def make(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text(source)

    return make


def entries(launcher: Launcher) -> dict[str, dict[str, Any]]:
    (loaded,) = launcher.loaded()
    return {entry["name"]: entry for entry in loaded.entries}


def is_well(launcher: Launcher) -> bool:
    slot = Slot(launcher.address)
    try:
        return slot.run(abs, -1) == 1 and slot.run(os.getppid) == launcher.pids()[0]
    finally:
        slot.close()


# ── what is loaded ──────────────────────────────────────────────────────────────────────────────


def test_modules_are_loaded_in_order_and_are_there_in_children(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    make_module("first", "state = ['first']")
    make_module("second", "import first; first.state.append('second')")
    launcher = new_launcher(preload=["first", "second"])

    state = make_slot(address=launcher.address).run(lambda: __import__("first").state)

    assert list(entries(launcher)) == ["first", "second"]
    assert state == ["first", "second"]
    assert not any(entry["error"] for entry in entries(launcher).values())


def test_the_report_says_who_loaded_for_how_long_and_how_big_it_is(
    new_launcher: NewLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        launcher = new_launcher(preload=["json", "decimal"])

    (loaded,) = launcher.loaded()
    assert [loaded.pid] == launcher.pids()
    assert sum(entry["seconds"] for entry in loaded.entries) <= loaded.seconds < 60
    assert 4 << 20 < loaded.rss_bytes < 1 << 30
    assert f"forkserver pid={loaded.pid} loaded json, decimal in" in caplog.text


def test_a_module_in_the_current_directory_is_found_as_celery_finds_it(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here_alone.py").write_text("")
    monkeypatch.chdir(tmp_path)

    assert entries(new_launcher(preload=["here_alone"]))["here_alone"]["error"] is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with Python 3.11")
def test_the_current_directory_does_not_come_before_everything_else(
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # `python -m` looks there first; the main process, which has been started otherwise, does not.
    for name in ("socket.py", "isolated_tasks.py"):
        (tmp_path / name).write_text("raise ImportError('not what was meant')")
    monkeypatch.chdir(tmp_path)

    launcher = new_launcher()

    for start_method in ("forkserver", "spawn"):
        slot = make_slot(address=launcher.address, start_method=start_method)
        assert slot.run(bodies.file_of, "isolated_tasks") == isolated_tasks.__file__


def test_the_set_up_is_run_before_the_preload(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    make_module("later", "import os; seen = os.environ['SET_UP_WITH']")
    launcher = new_launcher(
        setup="harness.bodies:set_up", setup_name="the app", setup_argument=b"x", preload=["later"]
    )

    assert list(entries(launcher)) == ["the app", "later"]
    assert make_slot(address=launcher.address).run(lambda: __import__("later").seen) == "x"


def test_a_spawned_child_runs_the_set_up_for_itself_and_no_preload(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    make_module("later", "import os; os.environ['PRELOADED'] = '1'")
    launcher = new_launcher(
        setup="harness.bodies:set_up", setup_name="the app", setup_argument=b"x", preload=["later"]
    )
    slot = make_slot(address=launcher.address, start_method="spawn", batch_size=2)

    # The environment of the forkserver is the spawned child's, what a preload has set included.
    assert slot.run(bodies.variables, "SET_UP_WITH")["SET_UP_WITH"] == "x"
    assert "later" not in slot.run(lambda: list(__import__("sys").modules))


def test_a_set_up_that_fails_is_told_and_is_the_error_of_each_call_that_is_spawned(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    launcher = new_launcher(
        setup="harness.bodies:set_up_badly", setup_name="the app", setup_argument=b"x"
    )
    slot = make_slot(address=launcher.address, start_method="spawn", batch_size=5)

    assert "LookupError: no app x" in entries(launcher)["the app"]["error"]
    for _ in range(2):
        with pytest.raises(LookupError, match="no app x") as caught:
            slot.run(abs, -1)
    assert caught.traceback[-1].name == "set_up_badly"
    # A fork is no worse for it: that is for the body to find out.
    assert is_well(launcher)


# ── what fails ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ("source", "error"),
    [
        (None, "ModuleNotFoundError: No module named 'faulty'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nonesuch", "No module named 'nonesuch'"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
    ids=["missing", "raises", "imports", "syntax", "exits", "interrupts"],
)
def test_a_preload_that_fails_is_told_with_its_traceback_and_the_rest_is_loaded(
    *,
    new_launcher: NewLauncher,
    make_module: MakeModule,
    caplog: pytest.LogCaptureFixture,
    source: str | None,
    error: str,
) -> None:
    if source is not None:
        make_module("faulty", source)

    launcher = new_launcher(preload=["faulty", "json"])

    told = entries(launcher)["faulty"]["error"]
    assert told.startswith("Traceback (most recent call last)")
    assert error in told
    assert entries(launcher)["json"]["error"] is None
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "failed to load faulty" in record.getMessage()
    assert error in record.getMessage()
    assert is_well(launcher)


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    "death",
    ["os._exit(0)", "os._exit(3)", "os.kill(os.getpid(), 9)", "import ctypes; ctypes.string_at(0)"],
)
def test_a_preload_that_ends_the_forkserver_is_an_error_of_the_start(
    new_launcher: NewLauncher, make_module: MakeModule, death: str
) -> None:
    make_module("deadly", f"import os; {death}")

    with pytest.raises(ForkserverError, match="died while it loaded") as caught:
        new_launcher(preload=["deadly"])

    assert caught.value.address


# ── what is left behind ─────────────────────────────────────────────────────────────────────────

THREAD = """
import threading
stop = threading.Event()
threading.Thread(target=stop.wait, name="the-culprit", daemon=True).start()
"""


@pytest.mark.fault(41)
def test_a_preload_that_leaves_a_thread_is_named_with_the_thread(
    new_launcher: NewLauncher, make_module: MakeModule, caplog: pytest.LogCaptureFixture
) -> None:
    make_module("threaded", THREAD)

    launcher = new_launcher(preload=["json", "threaded", "decimal"])

    threads = {name: entry["threads"] for name, entry in entries(launcher).items()}
    assert threads == {"json": [], "threaded": ["the-culprit"], "decimal": []}
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "threaded" in record.getMessage()
    assert "the-culprit" in record.getMessage()
    assert is_well(launcher)


def test_threads_that_a_fork_does_not_lose_are_not_told(
    new_launcher: NewLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    # OpenBLAS ends its own before a fork and starts them again.
    launcher = new_launcher(preload=["numpy"])

    assert entries(launcher)["numpy"]["threads"] == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("is_initialized", [True, False])
def test_a_preload_that_initialises_cuda_is_named(
    *,
    new_launcher: NewLauncher,
    make_module: MakeModule,
    caplog: pytest.LogCaptureFixture,
    is_initialized: bool,
) -> None:
    # No test machine has a card; what is asked of torch is this much.
    make_module("torch", "from types import SimpleNamespace\ncuda = SimpleNamespace()")
    make_module("model", f"import torch\ntorch.cuda.is_initialized = lambda: {is_initialized}")

    launcher = new_launcher(preload=["torch", "model"])

    cuda = {name: entry["cuda"] for name, entry in entries(launcher).items()}
    assert cuda == {"torch": False, "model": is_initialized}
    assert ("loading model initialised CUDA" in caplog.text) == is_initialized


@pytest.mark.fault(41)
def test_a_file_that_a_preload_opens_is_open_in_children_and_nothing_else_is(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    make_module("opens", "file = open(__file__)")
    launcher = new_launcher(preload=["opens", "harness.bodies"])
    slot = make_slot(address=launcher.address)

    descriptors = slot.run(bodies.descriptors)

    assert sum(target.endswith("opens.py") for target in descriptors.values()) == 1
    # The standard streams, that file, the worker's stderr and the pipe that stands in for it, the
    # call socket, the lifeline and the crash report.
    assert len(descriptors) == 9
    assert slot.run(lambda: __import__("opens").file.read()) == "file = open(__file__)"


@pytest.mark.fault(41)
def test_signal_handlers_of_a_preload_are_nobody_s_business(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    make_module(
        "handles",
        "import signal\n"
        "for name in ('SIGTERM', 'SIGUSR1', 'SIGINT', 'SIGALRM'):\n"
        "    signal.signal(getattr(signal, name), lambda *_: None)\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n",
    )
    launcher = new_launcher(preload=["handles", "harness.bodies"])
    slot = make_slot(address=launcher.address)

    dispositions = slot.run(bodies.dispositions)

    assert {name for name, value in dispositions.items() if value != "SIG_DFL"} == {
        *("SIGINT", "SIGPIPE", "SIGXFSZ"),
        *("SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1"),
    }
    assert slot.run(bodies.signal_masks)["SigBlk"] == 0


@pytest.mark.fault(41)
def test_processes_of_a_preload_confuse_nobody(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    make_module(
        "starts",
        "import subprocess\n"
        "gone = subprocess.Popen(['true'])\n"
        "stays = subprocess.Popen(['sleep', '1000'])\n",
    )
    launcher = new_launcher(preload=["starts"])
    slot = make_slot(address=launcher.address)

    stays = slot.run(lambda: __import__("starts").stays.pid)
    try:
        assert is_well(launcher)
        assert survivors([stays], timeout=0) == {stays}
    finally:
        os.kill(stays, 9)
        assert survivors([stays]) == set()


#: Preloads that start a process, by a fork, which holds what the forkserver has open.
FORKING = {
    "os.fork": """
import os, signal
helper = os.fork()
while helper == 0:
    signal.pause()
""",
    "multiprocessing": """
import multiprocessing, signal
def stay():
    while True:
        signal.pause()
process = multiprocessing.get_context("fork").Process(target=stay, daemon=True)
process.start()
helper = process.pid
""",
}


@pytest.fixture(params=FORKING)
def forking(
    request: pytest.FixtureRequest, new_launcher: NewLauncher, make_module: MakeModule
) -> Launcher:
    """A forkserver whose preload has forked a process that stays."""
    make_module("forking", FORKING[request.param])
    return new_launcher(preload=["forking", "harness.bodies"])


def helper_of(slot: Slot) -> int:
    helper: int = slot.run(lambda: __import__("forking").helper)
    return helper


@pytest.mark.fault(39, 41)
def test_what_a_preload_has_forked_does_not_hide_the_death_of_its_forkserver(
    forking: Launcher, make_slot: MakeSlot
) -> None:
    slot = make_slot(address=forking.address)
    helper = helper_of(slot)
    slot.close()
    (before,) = forking.pids()
    try:
        os.kill(before, signal.SIGKILL)

        # Long before anybody finds that it does not answer.
        assert select.select(forking.descriptors(), [], [], forking.plan.patience / 4)[0]
        forking.check()
        assert forking.pids() != [before]
        forking.wait_loaded(PATIENCE)
        assert slot.run(os.getppid) != before
    finally:
        # Nobody is left who could.
        os.kill(helper, signal.SIGKILL)
    wait_gone([helper])


FORKED_IN_C = """
import ctypes, signal
helper = ctypes.PyDLL(None).fork()
while helper == 0:
    signal.pause()
"""


@pytest.mark.fault(41)
def test_a_forkserver_that_is_killed_for_its_silence_is_replaced_whoever_holds_its_socket(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot
) -> None:
    # What C forks does not hear of what Python has for forks.
    make_module("forking", FORKED_IN_C)
    launcher = new_launcher(preload=["forking"], patience=0.5)
    slot = make_slot(address=launcher.address)
    helper = helper_of(slot)
    slot.close()
    (before,) = launcher.pids()
    try:
        os.kill(before, signal.SIGSTOP)
        # It is asked, it is killed, it is seen to be gone.
        deadline = time.monotonic() + PATIENCE
        while launcher.pids() == [before]:
            assert time.monotonic() < deadline, "it is not replaced"
            select.select(launcher.descriptors(), [], [], 0.05)
            launcher.check()

        launcher.wait_loaded(PATIENCE)
        assert slot.run(os.getppid) != before
    finally:
        os.kill(helper, signal.SIGKILL)
    wait_gone([before, helper])


@pytest.mark.fault(41)
@pytest.mark.parametrize("end", ["stopped", "replaced"])
def test_what_a_preload_has_forked_lives_as_long_as_its_forkserver_and_no_longer(
    forking: Launcher, make_slot: MakeSlot, end: str
) -> None:
    slot = make_slot(address=forking.address)
    helper = helper_of(slot)
    (before,) = forking.pids()
    # It is there for all of them.
    slot.run(abs, -1)
    slot.close()
    assert survivors([helper], timeout=0) == {helper}

    if end == "stopped":
        forking.stop()
    else:
        forking.replace("a test wants it", at_once=True)
        forking.wait_loaded(PATIENCE)
        wait_gone([before])
        assert helper_of(slot) != helper

    assert survivors([helper]) == set()


SHELL = """
import subprocess
shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
processes = [shell.pid, int(shell.stdout.readline())]
"""


@pytest.mark.fault(41)
@pytest.mark.parametrize("end", ["stopped", "replaced"])
def test_what_a_preload_has_started_goes_with_all_that_it_has_started_itself(
    new_launcher: NewLauncher, make_module: MakeModule, make_slot: MakeSlot, end: str
) -> None:
    make_module("shell", SHELL)
    launcher = new_launcher(preload=["shell"])
    slot = make_slot(address=launcher.address)
    processes = slot.run(lambda: __import__("shell").processes)
    slot.close()

    if end == "stopped":
        launcher.stop()
    else:
        launcher.replace("a test wants it", at_once=True)
        launcher.wait_loaded(PATIENCE)

    assert survivors(processes) == set()


@pytest.mark.fault(41)
@pytest.mark.parametrize("how", FORKING)
def test_the_helper_of_a_preload_is_no_concern_of_exit_hooks(
    *,
    new_launcher: NewLauncher,
    make_module: MakeModule,
    make_slot: MakeSlot,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    how: str,
) -> None:
    trace = tmp_path / "trace"
    make_module("forking", FORKING[how])
    launcher = new_launcher(preload=["forking", "harness.bodies"])
    slot = make_slot(address=launcher.address)

    slot.run(bodies.register, bodies.append, str(trace), "the hook")
    slot.close()

    assert trace.read_text() == "the hook\n"
    assert capfd.readouterr().err == ""


def test_what_a_body_forks_keeps_all_descriptors_of_it(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    slot = make_slot(address=new_launcher(preload=["harness.bodies"]).address)

    opened, kept_by_generation = slot.run(bodies.fork_with_open_files, 100)

    # So many that some have the numbers of what the forkserver keeps from forks.
    assert kept_by_generation == [opened, opened]


@pytest.mark.fault(41)
def test_a_preload_that_prints_is_heard(
    capfd: pytest.CaptureFixture[str], new_launcher: NewLauncher, make_module: MakeModule
) -> None:
    make_module("prints", "print('loading the model', flush=True)")

    new_launcher(preload=["prints"])

    assert "loading the model" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("package", "patch"),
    [
        ("gevent", "import gevent.monkey; gevent.monkey.patch_all()"),
        ("eventlet", "import eventlet; eventlet.monkey_patch()"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_preload_that_patches_the_standard_library_is_borne(
    *,
    new_launcher: NewLauncher,
    make_module: MakeModule,
    make_slot: MakeSlot,
    package: str,
    patch: str,
) -> None:
    # Not imported here: eventlet would have each fork of this process warn from then on.
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}")
    make_module("patches", patch)

    launcher = new_launcher(preload=["patches"])

    assert entries(launcher)["patches"]["error"] is None
    assert is_well(launcher)
    assert make_slot(address=launcher.address).run(bodies.use_the_standard_library) == ["thread", 3]
