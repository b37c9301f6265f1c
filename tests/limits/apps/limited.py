"""Tasks that come to their limits, or are told to stop, and one that says whom it runs beside."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask
from isolated_tasks.errors import MemoryLimitExceeded

app = make_app(__name__)

MIB = 1 << 20
#: Where the second step of a ladder is sent.
LARGE = f"{os.environ['TEST_QUEUE']}-large"

held: list[object] = []


def _body(name: str) -> Callable[..., Any]:
    body: Callable[..., Any] = getattr(bodies, name)
    return body


@app.task(base=IsolatedTask)
def run(body: str, *args: Any, **kwargs: Any) -> Any:
    """Run one of the harness's bodies."""
    return _body(body)(*args, **kwargs)


@app.task
def plain_run(body: str, *args: Any, **kwargs: Any) -> Any:
    return _body(body)(*args, **kwargs)


@app.task
def errback(request: Any, exc: BaseException, traceback: object, *, path: str) -> None:
    """Called by Celery as a function, when the task fails that it is linked to."""
    bodies.append(path, type(exc).__name__)


def stay() -> NoReturn:
    """Stay in Python, where a signal interrupts."""
    while True:
        time.sleep(1000)


def _stay_and_clean_up(mailbox: str) -> None:
    try:
        # In here: what the test does about it may come at once.
        bodies.report(mailbox, os.getpid())
        stay()
    finally:
        bodies.report(mailbox, "cleaned up")


# ── time ────────────────────────────────────────────────────────────────────────────────────────


@app.task(base=IsolatedTask, soft_time_limit=0.3, time_limit=60)
def handle_soft_time_limit(mailbox: str) -> str:
    try:
        bodies.report(mailbox, os.getpid())
        stay()
    except SoftTimeLimitExceeded:
        return "cleaned up"


@app.task(base=IsolatedTask)
def stay_and_clean_up(mailbox: str) -> None:
    """Its limits are the caller's."""
    _stay_and_clean_up(mailbox)


@app.task(base=IsolatedTask, time_limit=0.4)
def block_in_c(mailbox: str) -> None:
    """Wait for a lock that nobody opens, with the GIL held: no signal handler of Python's runs."""
    bodies.report(mailbox, os.getpid())
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(128)  # zeros are PTHREAD_MUTEX_INITIALIZER
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


@app.task(base=IsolatedTask, time_limit=0.4)
def leave_stubborn_processes(mailbox: str) -> None:
    """Two grandchildren that ignore SIGTERM: in the group, and in a session of its own."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    programs = [
        # An ignored signal stays ignored in what is exec'd.
        subprocess.Popen(["sleep", "1000"], start_new_session=own_session)
        for own_session in (False, True)
    ]
    held.extend(programs)  # or their __del__ would warn
    signal.signal(signal.SIGTERM, before)
    bodies.report(mailbox, os.getpid(), *(program.pid for program in programs))
    stay()


@app.task(
    base=IsolatedTask,
    bind=True,
    time_limit=0.4,
    autoretry_for=(TimeLimitExceeded,),
    default_retry_delay=0,
)
def retry_for_time(self: Task, mailbox: str) -> int:
    bodies.report(mailbox, os.getpid())
    retries: int = self.request.retries
    if not retries:
        stay()
    return retries


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


@app.task(base=IsolatedTask, memory_limit="150MiB")
def hold_too_much(mailbox: str) -> None:
    bodies.report(mailbox, os.getpid())
    bodies.hold(250 * MIB)
    stay()


@app.task(base=IsolatedTask, memory_limit="150MiB")
def let_others_hold_too_much(mailbox: str) -> None:
    """Each holds less than the limit."""
    pids = []
    for own_session in (False, True):
        pid = os.fork()
        if pid == 0:
            if own_session:
                os.setsid()
            bodies.hold(100 * MIB)
            stay()
        pids.append(pid)
    bodies.report(mailbox, os.getpid(), *pids)
    stay()


@app.task(base=IsolatedTask, soft_memory_limit="200MiB")
def handle_soft_memory_limit(mailbox: str) -> str:
    bodies.report(mailbox, os.getpid())
    try:
        bodies.hold(300 * MIB)
    except MemoryError:
        return "cleaned up"
    return "there was room"


@app.task(base=IsolatedTask, soft_memory_limit="200MiB")
def exceed_soft_memory_limit(mailbox: str) -> None:
    bodies.report(mailbox, os.getpid())
    held.append(bytearray(300 * MIB))


@app.task(
    base=IsolatedTask,
    bind=True,
    memory_limit="150MiB",
    autoretry_for=(MemoryLimitExceeded,),
    default_retry_delay=0,
)
def retry_for_memory(self: Task, mailbox: str) -> int:
    bodies.report(mailbox, os.getpid())
    retries: int = self.request.retries
    if not retries:
        bodies.hold(250 * MIB)
        stay()
    return retries


def _climb(task: Task, mailbox: str, path: str, steps: int) -> list[Any]:
    """Need more than each step but the last, and say how it came that far."""
    request = task.request
    bodies.report(mailbox, os.getpid())
    bodies.append(path, request.retries)
    bodies.hold(250 * MIB)
    with open(path) as file:
        runs = len(file.readlines())
    if runs < steps:
        stay()
    return [runs, request.retries, request.delivery_info["routing_key"]]


@app.task(base=IsolatedTask, bind=True, memory_limit=("150MiB", "500MiB"), max_retries=0)
def climb(self: Task, mailbox: str, path: str) -> list[Any]:
    return _climb(self, mailbox, path, 2)


@app.task(base=IsolatedTask, bind=True, memory_limit=("150MiB", ("500MiB", LARGE)))
def climb_elsewhere(self: Task, mailbox: str, path: str) -> list[Any]:
    return _climb(self, mailbox, path, 2)


@app.task(base=IsolatedTask, bind=True, memory_limit=("120MiB", "160MiB"))
def climb_in_vain(self: Task, mailbox: str, path: str) -> list[Any]:
    return _climb(self, mailbox, path, 3)


# ── admission: the worker's budget is 600 MiB ───────────────────────────────────────────────────


@app.task(base=IsolatedTask, memory_limit="400MiB")
def take_most_of_the_budget(mailbox: str, fifo: str) -> tuple[int, str]:
    return bodies.report_and_wait(mailbox, fifo)


@app.task(base=IsolatedTask, memory_limit="400MiB", time_limit=1)
def look_for(pid: int) -> bool:
    """Whether that process is there, or has not even been reaped."""
    return os.path.exists(f"/proc/{pid}")


@app.task(base=IsolatedTask, memory_limit="2GiB")
def take_more_than_there_is(mailbox: str) -> None:
    bodies.report(mailbox, os.getpid())


# ── CPU and the rest ────────────────────────────────────────────────────────────────────────────


@app.task(base=IsolatedTask, cpu_time_limit=1)
def spin(mailbox: str) -> NoReturn:
    bodies.report(mailbox, os.getpid())
    while True:
        pass


@app.task(base=IsolatedTask, max_open_files=40)
def open_many_files(mailbox: str) -> NoReturn:
    bodies.report(mailbox, os.getpid())
    while True:
        held.append(open(os.devnull))  # noqa: SIM115


# ── losses and the end of the worker ────────────────────────────────────────────────────────────


@app.task(base=IsolatedTask, acks_late=True, reject_on_worker_lost=True)
def be_lost(mailbox: str) -> None:
    bodies.report(mailbox, os.getpid())
    bodies.kill_myself(signal.SIGKILL)


@app.task(base=IsolatedTask, acks_late=True)
def stay_and_clean_up_late(mailbox: str) -> None:
    _stay_and_clean_up(mailbox)
