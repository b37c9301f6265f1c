"""Bodies that do what nobody should: for the tests of faults, beside `harness.bodies`."""

import collections
import ctypes
import itertools
import locale
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from harness import bodies
from harness.bodies import report

if TYPE_CHECKING:
    import numpy as np

LIBC = ctypes.PyDLL(None)  # PyDLL: the GIL is held in its functions

# ── crashes ─────────────────────────────────────────────────────────────────────────────────────


def crash(name: str) -> None:
    """Die of this signal as C code does, which nobody has sent."""
    if name == "SIGSEGV":
        ctypes.string_at(0)
    elif name == "SIGABRT":
        LIBC.abort()
    elif name == "SIGBUS":
        touch_what_is_not_there()
    elif name == "SIGFPE":
        divide_by_zero()
    else:
        raise ValueError(name)


def touch_what_is_not_there() -> None:
    descriptor = os.memfd_create("short")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    with mmap.mmap(descriptor, mmap.PAGESIZE) as memory:
        os.ftruncate(descriptor, 0)
        memory[0]


def divide_by_zero() -> None:
    LIBC.div(1, 0)
    # Not every processor minds.
    getattr(LIBC, "raise")(signal.SIGFPE)


def crash_in_a_thread(name: str) -> None:
    thread = threading.Thread(target=crash, args=(name,))
    thread.start()
    thread.join()


def exit_in_c(code: int) -> None:
    LIBC.exit(code)


class CrashesWhenDropped:
    def __del__(self) -> None:
        bodies.crash_in_c()


def drop_what_crashes() -> None:
    CrashesWhenDropped()


def keep_what_crashes() -> str:
    """Leave something that crashes should anybody collect it at the end of the process."""
    circle: list[object] = [CrashesWhenDropped()]
    circle.append(circle)
    bodies.held.extend([CrashesWhenDropped(), circle])
    return "kept"


# ── recursion ───────────────────────────────────────────────────────────────────────────────────


def recurse() -> None:
    recurse()


def overflow_the_stack() -> None:
    """As C code does: the interpreter's own count of calls does not come to its limit."""
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) for line in file if line.startswith("VmStk"))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, ((used + 64) * 1024, hard))

    def deeper(depth: int) -> int:
        # Through C, so that each call takes of the stack of C.
        return max([depth], key=lambda depth: deeper(depth - 1) if depth else 0)

    deeper(400)


class Endless:
    """Pickling it is to pickle another one."""

    def __reduce__(self) -> tuple[type, tuple[object]]:
        return Endless, (Endless(),)


class EndlessError(Exception):
    def __reduce__(self) -> tuple[type, tuple[object]]:
        return EndlessError, (EndlessError("again"),)


def return_endless() -> Endless:
    return Endless()


def return_nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def fail_endlessly() -> NoReturn:
    raise EndlessError("text")


# ── signals and exceptions ──────────────────────────────────────────────────────────────────────


def compute_in_c() -> None:
    """For ever, without once looking for signals."""
    collections.deque(itertools.repeat(None), maxlen=0)


@bodies.marks_body
def compute_in_c_timed(mailbox: str) -> None:
    from isolated_tasks.process import limits

    report(mailbox, os.getpid())
    with limits.body():
        compute_in_c()


@bodies.marks_body
def mind_nothing(mailbox: str) -> NoReturn:
    """Block and ignore all signals there are, and swallow whatever is raised."""
    from isolated_tasks.process import limits

    report(mailbox, os.getpid())
    with limits.body():
        while True:
            try:
                for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                    try:
                        signal.signal(number, signal.SIG_IGN)
                    except OSError:
                        pass  # one that the C library keeps for itself
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                while True:
                    time.sleep(0.01)
            except BaseException:
                pass


def ignore_the_alarm_and_stay(mailbox: str) -> NoReturn:
    """A hook that takes away what would end it."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    report(mailbox, os.getpid())
    while True:
        time.sleep(1000)


def leave_a_thread_for_ever() -> str:
    threading.Thread(target=threading.Event().wait).start()
    return "started"


# ── descriptors and output ──────────────────────────────────────────────────────────────────────


def replace_all_descriptors(by: str) -> str:
    """Have our descriptors mean something else, and write into all of them."""
    if by == "a socket":
        one, other = socket.socketpair()
        # Both stay open: whoever sends something finds a peer.
        source = one.detach()
        keep = {source, other.detach()}
    else:
        path = {"/dev/null": os.devnull, "a program": "/bin/true"}[by]
        source = os.open(path, os.O_RDONLY if by == "a program" else os.O_RDWR)
        keep = {source}
    for descriptor in set(bodies.descriptors()) - {0, 1, 2} - keep:
        os.dup2(source, descriptor)
    return "a result"


def write_into_all_descriptors() -> str:
    for descriptor in bodies.descriptors():
        if descriptor > 2:
            try:
                os.write(descriptor, b"\xff\x00 no frame of yours\n" * 10)
            except OSError:
                pass
    return "a result"


def write_much(size: int) -> str:
    """To stdout and stderr: no line ends, and nothing that UTF-8 knows."""
    for descriptor in (1, 2):
        data = b"\xff\xfe\xc3" * (size // 3)
        while data:
            data = data[os.write(descriptor, data) :]
    return "a result"


# ── what a process is ───────────────────────────────────────────────────────────────────────────


def surroundings() -> dict[str, object]:
    """All that a body could change, and that the next one must not see."""
    umask = os.umask(0)
    os.umask(umask)
    return {
        "directory": os.getcwd(),
        "environment": {
            # Of the test's own, which differs from one to the next.
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PYTEST")
        },
        "umask": umask,
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "handlers": bodies.dispositions(),
        "limits": {
            name: resource.getrlimit(getattr(resource, name))
            for name in ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA")
        },
        "locale": locale.setlocale(locale.LC_ALL),
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "threads": threading.active_count(),
        "stdout": sys.stdout.closed,
    }


def change_surroundings(directory: str) -> dict[str, object]:
    """Change all of them; what they were changed to."""
    os.chdir(directory)
    os.environ["LEFT_BEHIND"] = "1"
    os.environ.pop("PATH")
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 34, 1 << 34))
    locale.setlocale(locale.LC_ALL, "C.UTF-8" if _is_c_locale() else "C")
    sys.path.insert(0, "/nonesuch")
    sys.setrecursionlimit(77_777)
    os.nice(1)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    sys.stdout.close()
    return surroundings()


def _is_c_locale() -> bool:
    return locale.setlocale(locale.LC_ALL) == "C"


# ── pickles ─────────────────────────────────────────────────────────────────────────────────────


def act(how: str) -> NoReturn:
    """End in this way."""
    if how == "an error":
        raise LookupError("on purpose")
    if how == "SystemExit":
        raise SystemExit(7)
    if how == "an exit":
        os._exit(7)
    if how == "a crash":
        bodies.crash_in_c()
    raise ValueError(how)


class Trap:
    """What happens when it is pickled, or loaded again.

    Args:
        when: "pickled" or "loaded".
        how: see `act`.
        size: of what travels with it.
    """

    def __init__(self, when: str, how: str, size: int = 0) -> None:
        self.when = when
        self.how = how
        self.ballast = b"x" * size

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        if self.when == "pickled":
            act(self.how)
        return _spring, (self.how, self.ballast)


def _spring(how: str, ballast: bytes) -> NoReturn:
    act(how)


def return_trap(when: str, how: str, size: int = 0) -> Trap:
    return Trap(when, how, size)


def return_much_later(mailbox: str, fifo: str, size: int) -> bytes:
    bodies.report_and_wait(mailbox, fifo)
    return bodies.many_bytes(size)


def bytes_and_arrays(size: int) -> tuple[bytes, "np.ndarray[Any, Any]", list[bytes]]:
    """Once in the pickle, once beside it, once in pieces of which the sizes differ."""
    import numpy as np

    array = np.arange(size, dtype="u1")
    return array.tobytes(), array, [array.tobytes()[:part] for part in (0, 1, size // 3)]


def large_array(size: int) -> "np.ndarray[Any, Any]":
    """Of which only the two ends are more than zeros, and take room."""
    import numpy as np

    array = np.zeros(size, dtype="u1")
    array[0], array[-1] = 1, 2
    return array


class Unpicklable:
    """Refuses with an exception of this class."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __reduce__(self) -> NoReturn:
        raise self.error("not this one")


def return_unpicklable(error: str) -> dict[str, Any]:
    errors = {one.__name__: one for one in (AttributeError, TypeError, pickle.PicklingError)}
    return {"fine": 1, "here": [Unpicklable(errors[error])]}


class TwoArguments(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, where: str, how: str) -> None:
        super().__init__(f"{where}: {how}")


class Mute(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class FromElsewhere(Exception):
    def __setstate__(self, state: object) -> None:
        raise RuntimeError("not here")


def fail_oddly(how: str) -> NoReturn:
    """Raise an exception that does not travel well."""
    if how == "two arguments":
        raise TwoArguments("here", "badly")
    if how == "a lambda":
        raise ValueError("text", lambda: 7)
    if how == "a lock":
        raise ValueError("text", threading.Lock())
    if how == "a generator":
        error = ValueError("text")
        error.source = (number for number in range(3))  # type: ignore[attr-defined]
        raise error
    if how == "no text":
        raise Mute("unspeakable")
    if how == "an error when it is loaded":
        strange = FromElsewhere("text")
        strange.more = 1  # type: ignore[attr-defined]
        raise strange
    if how == "its own traceback":
        try:
            raise ValueError("text")
        except ValueError as exc:
            exc.args = ("text", exc.__traceback__)
            raise
    if how == "itself as its cause":
        error = ValueError("text")
        other = LookupError("other")
        error.__cause__, other.__cause__ = other, error
        raise error
    raise AssertionError(how)


# ── trees ───────────────────────────────────────────────────────────────────────────────────────


def leave_a_program_with_nohup(mailbox: str) -> int:
    """As a script does that means well by what it starts."""
    command = "nohup sleep 1000 >/dev/null 2>&1 & echo $! "
    shell = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, check=True)
    report(mailbox, int(shell.stdout))
    return os.getpid()


@bodies.marks_body
def start_programs(mailbox: str, ending: str) -> int:
    """Three programs, two of them in sessions of their own; then end."""
    from isolated_tasks.process import limits

    script = "trap '' HUP TERM INT; sleep 1000 & wait; sleep 1000"
    programs = [
        subprocess.Popen(["sleep", "1000"]),
        subprocess.Popen(["sleep", "1000"], start_new_session=True),
        subprocess.Popen(["sh", "-c", script], start_new_session=True),
    ]
    bodies.held.extend(programs)  # or their __del__ would warn
    report(mailbox, os.getpid(), *(program.pid for program in programs))
    with limits.body():
        if ending in ("its time is up", "it is stopped"):
            bodies.hang_alone("asleep")
        elif ending == "it crashes":
            bodies.crash_in_c()
        elif ending == "it raises":
            raise LookupError(ending)
    return os.getpid()


def leave_many_dead(count: int) -> int:
    """Fork as many, and reap none; half of them are orphans of an orphan's."""
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            if number % 2 and os.fork():
                os._exit(0)
            os._exit(number % 256)
    return os.getpid()


def leave_many_dead_and_die(count: int) -> None:
    leave_many_dead(count)
    bodies.kill_myself(signal.SIGKILL)


def fork_and_reap(count: int) -> int:
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(number % 256)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == number % 256
    return count


def begin_and_stay(path: str, trace: object = None) -> NoReturn:
    """Leave a trace, by default the pid."""
    bodies.append(path, os.getpid() if trace is None else trace)
    bodies.hang_alone("asleep")


@bodies.marks_body
def begin_and_end(mailbox: str, name: object, seconds: float, size: int) -> bytes:
    """Report, take so long, and return so many bytes."""
    from isolated_tasks.process import limits

    report(mailbox, name)
    with limits.body():
        time.sleep(seconds)
        return bodies.many_bytes(size)


def tell_the_time_thrice() -> list[float]:
    return [time.time() for _ in range(3)]


# ── memory ──────────────────────────────────────────────────────────────────────────────────────

MIB = 1 << 20


def grow_slowly(mailbox: str, step: int) -> NoReturn:
    """A leak, never more at once than this."""
    report(mailbox, os.getpid())
    while True:
        bodies.hold(step)
        time.sleep(0.001)


def grow_at_once(mailbox: str, size: int) -> NoReturn:
    report(mailbox, os.getpid())
    bodies.hold(size)
    bodies.hang_alone("asleep")


def resident_bytes_after(seconds: float) -> int:
    """Of this process, when it has been looked at for so long."""
    from isolated_tasks.process import system

    time.sleep(seconds)
    return system.rss_bytes()


def use_and_free(size: int, times: int) -> str:
    for _ in range(times):
        bodies.touch(size)
    return "well"


def map_a_file(path: str, size: int) -> str:
    """A large one, of which little is read."""
    with open(path, "w+b") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory:
            for offset in range(0, size, size // 100):
                assert memory[offset] == 0
            time.sleep(0.25)
    return "well"


def reserve(size: int) -> str:
    """Have the kernel promise memory, and not use it."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE):
        time.sleep(0.25)
    return "well"


MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def start_threads(count: int) -> str:
    """Each has a stack of 8 MiB, reserved, not used."""
    threading.stack_size(8 * MIB)
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.25)
    stop.set()
    for thread in threads:
        thread.join()
    return "well"


def share_memory(mailbox: str, size: int) -> NoReturn:
    """Hold memory that processes share, half of it each of two."""
    report(mailbox, os.getpid())
    memory = mmap.mmap(-1, size)  # MAP_SHARED
    half = 0 if os.fork() else size // 2
    for offset in range(half, half + size // 2, MIB):
        memory[offset : offset + MIB] = b"x" * MIB
    bodies.hang_alone("asleep")
