"""What tests run in children.

Functions are pickled by reference, so they stand in a module that the forkserver can import. It is
imported by forkservers, children and their own pools, so it imports as little as it can.
"""

import _thread
import atexit
import ctypes
import errno
import fcntl
import gc
import importlib
import json
import locale
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

#: How a body hangs: see `hang`.
HANGING = ("asleep", "spinning", "stuck in C", "stopped")

#: What `hold` keeps.
held: list[object] = []


def report(mailbox: str, *values: object) -> None:
    """Tell the test something, also from a process whose result nobody waits for."""
    with open(mailbox, "w") as file:
        file.write(json.dumps(values) + "\n")


def call_by_name(module: str, function: str) -> Any:
    """What a function returns that the caller cannot import, or has another one of."""
    return getattr(importlib.import_module(module), function)()


def append(path: str, line: object) -> int:
    """Leave a trace of this run, in one write."""
    with open(path, "a") as file:
        file.write(f"{line}\n")
    return os.getpid()


def append_and_leave_a_process(path: str, line: object) -> int:
    """Leave a trace, and a process in a session of its own, which leaves its pid beside it."""
    append(path, line)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        append(f"{path}.left", os.getpid())
        os.write(writer, b"x")
        _pause()
    os.close(writer)
    os.read(reader, 1)  # until it has left our group, which will be killed, or is gone
    return os.getpid()


# ── values and exceptions ───────────────────────────────────────────────────────────────────────


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def double(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    array *= 2  # in place: what was received can be written to
    return array


def many_bytes(size: int) -> bytes:
    return b"a" + bytes(size - 2) + b"z"


def fail(exc: BaseException) -> NoReturn:
    raise exc


def fail_below(depth: int) -> None:
    if depth:
        fail_below(depth - 1)
    numbers = {"a": 1}
    print(numbers["b"])


def exit_with(code: object) -> NoReturn:
    sys.exit(code)  # type: ignore[arg-type]


def lock_inside() -> dict[str, Any]:
    return {"fine": 1, "conn": [threading.Lock()]}


def fail_with_a_stranger() -> NoReturn:
    """Raise an exception of a module that only this process has."""
    raise _stranger(Exception)("who?")


def return_a_stranger() -> object:
    return _stranger(object)()


def _stranger(base: type) -> type:
    module = types.ModuleType("only_there")
    sys.modules["only_there"] = module
    module.Stranger = type("Stranger", (base,), {"__module__": "only_there"})  # type: ignore[attr-defined]
    return module.Stranger  # type: ignore[no-any-return]


# ── deaths ──────────────────────────────────────────────────────────────────────────────────────


def leave(code: int) -> NoReturn:
    os._exit(code)


def become(program: str) -> NoReturn:
    os.execv(program, [program])


def crash_in_c() -> None:
    ctypes.string_at(0)


def abort() -> NoReturn:
    os.abort()


def free_twice() -> None:
    """What glibc ends a process for, and says so."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(64)
    libc.free(block)
    libc.free(block)


def spin_for_ever() -> NoReturn:
    while True:
        pass


def hold_and_wait(size: int) -> NoReturn:
    hold(size)
    _pause()


# ── stderr ──────────────────────────────────────────────────────────────────────────────────────


def write_stderr(text: str) -> None:
    """Write on stderr as a library in C does, without Python's."""
    data = text.encode(errors="surrogateescape")
    while data:
        data = data[os.write(2, data) :]


def say_and_end(text: str, how: str) -> str:
    write_stderr(text)
    if how == "abort":
        os.abort()
    return "said"


def say_and_wait(text: str, mailbox: str, fifo: str) -> str:
    write_stderr(text)
    report(mailbox, os.getpid())
    return wait_for_word(fifo)


def run_program(command: list[str]) -> None:
    subprocess.run(command, check=True)


def flood_at_exit() -> int:
    """Write more than a pipe holds when the call is over."""
    atexit.register(write_stderr, "x" * 1_000_000)
    return os.getpid()


def say_now_and_at_exit(now: str, at_exit: str) -> None:
    atexit.register(write_stderr, at_exit)
    write_stderr(now)


def kill_myself(number: int) -> None:
    os.kill(os.getpid(), number)


def hold_and_leave(size: int) -> NoReturn:
    memory = bytearray(b"x") * size
    os._exit(len(memory) % 1)


def die_while_sending(size: int) -> bytes:
    """Return something large, and be killed when part of it has been sent."""
    thread = threading.Thread(target=_die_when_sending, args=(call_socket(),), daemon=True)
    thread.start()
    return bytes(size)


def _die_when_sending(descriptor: int) -> NoReturn:
    while True:
        (unread,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
        if unread > 10_000:  # more than the message that came before
            os.kill(os.getpid(), signal.SIGKILL)


def call_socket() -> int:
    """The only socket that a child has."""
    (descriptor,) = (n for n, target in descriptors().items() if target.startswith("socket:"))
    return descriptor


def talk_nonsense() -> None:
    os.write(call_socket(), b"GET / HTTP/1.1\r\n\r\n")


class Toucher:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def send_outcome(pickled: bytes) -> NoReturn:
    """Send this as the outcome, and wait."""
    from isolated_tasks.process import protocol

    frame = protocol.encode(protocol.Outcome(pickled, measured=nothing_measured()))
    os.write(call_socket(), b"".join(map(bytes, frame)))
    _pause()


def nothing_measured() -> bytes:
    """What a child says to have measured that has used nothing."""
    from isolated_tasks.process.usage import Measured

    return Measured(0, 0, 0, 0.0, 0.0, 0.0).pack()


def announce(size: int) -> NoReturn:
    """Begin an outcome of this size."""
    from isolated_tasks.process import protocol

    head = (protocol.MAGIC, protocol.VERSION, protocol.Kind.OUTCOME, 0, 0, size)
    os.write(call_socket(), protocol.HEADER.pack(*head))
    _pause()


def encoded(size: int) -> Any:
    from isolated_tasks.process.plain import Encoded

    return Encoded(b"x" * size)


def fail_at_length(size: int) -> NoReturn:
    raise ValueError("x" * size)


def send_an_outcome_and_nonsense() -> None:
    """Have both arrive at once."""
    from isolated_tasks.process import pickling, protocol
    from isolated_tasks.process.outcome import Outcome

    pickled = pickling.dumps(Outcome(value="it stands"))
    outcome = protocol.Outcome(pickled.body, pickled.buffers, measured=nothing_measured())
    frame = protocol.encode(outcome)
    os.write(call_socket(), b"".join(map(bytes, frame)) + b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(1000)


def talk_nonsense_and_leave(code: int) -> NoReturn:
    talk_nonsense()
    os._exit(code)


def talk_nonsense_later(mailbox: str, fifo: str) -> int:
    """Do so from a thread that Python does not list, when the call is over."""

    def work() -> None:
        wait_for_word(fifo)
        talk_nonsense()
        report(mailbox, "done")

    _thread.start_new_thread(work, ())
    return os.getpid()


def close_all_descriptors() -> None:
    os.closerange(0, 1 << 16)


def write_garbage() -> str:
    for descriptor in (1, 2):
        os.write(descriptor, b"\xff\x00\xfe\n" * 2000)
    return "fine"


# ── copies and grandchildren ────────────────────────────────────────────────────────────────────


def fork_and_both_return() -> tuple[str, int]:
    pid = os.fork()
    if pid == 0:
        return "copy", 0
    _, status = os.waitpid(pid, 0)
    return "original", os.waitstatus_to_exitcode(status)


def fork_and_the_copy_raises() -> tuple[str, int]:
    pid = os.fork()
    if pid == 0:
        raise ValueError("copy")
    _, status = os.waitpid(pid, 0)
    return "original", os.waitstatus_to_exitcode(status)


def fork_with_open_files(count: int) -> tuple[int, list[int]]:
    """Open files; how many of these there are, and are still open in a child and a grandchild."""
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes([_count_open(files)]))
        grandchild = os.fork()
        if grandchild == 0:
            os.write(writer, bytes([_count_open(files)]))
            os._exit(0)
        os.waitpid(grandchild, 0)
        os._exit(0)
    os.waitpid(child, 0)
    return count, list(os.read(reader, 2))


def _count_open(files: list[int]) -> int:
    return sum(number in descriptors() for number in files)


def leave_a_daemon(mailbox: str, code: int) -> NoReturn:
    """Exit while a grandchild in a session of its own holds all our descriptors."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        report(mailbox, os.getpid())
        os.write(writer, b"x")
        _pause()
    os.read(reader, 1)  # until it has left our group, which will be killed
    os._exit(code)


def leave_grandchildren() -> list[int]:
    return _grandchildren()


def _grandchildren() -> list[int]:
    """Two processes that stay: one that was forked, and one that runs another program."""
    forked = os.fork()
    if forked == 0:
        _pause()
    program = subprocess.Popen(["sleep", "1000"])
    held.append(program)  # or its __del__ would warn
    return [forked, program.pid]


def _pause() -> NoReturn:
    while True:
        signal.pause()


def hang(mailbox: str, how: str) -> NoReturn:
    """Report the pids of this process and of two grandchildren, and never return."""
    # Without descriptors it is alone: others would hold those that it has closed.
    report(mailbox, os.getpid(), *(() if how == "without descriptors" else _grandchildren()))
    hang_alone(how)


def hang_alone(how: str) -> NoReturn:
    let_signals_come()
    while True:
        if how == "asleep":
            time.sleep(1000)
        elif how == "spinning":
            pass
        elif how == "stuck in C":
            ctypes.PyDLL(None).sleep(1000)  # PyDLL: the GIL is held meanwhile
        elif how == "deadlocked in C":
            # Unlike sleep(3), which ends when a signal has been handled.
            mutex = ctypes.create_string_buffer(128)
            for _ in range(2):
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        elif how == "without descriptors":
            close_all_descriptors()
            time.sleep(1000)
        elif how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise ValueError(how)


def wait_for_word(fifo: str) -> str:
    """Return what somebody writes into the fifo, once somebody does."""
    with open(fifo) as file:
        return file.read()


def report_and_wait_with(mailbox: str, fifo: str, secret: str) -> tuple[int, str]:
    """Have a secret as an argument, and another one in the environment."""
    report(mailbox, os.getpid(), os.environ["TOKEN"])
    return os.getpid(), wait_for_word(fifo)


def report_and_wait(mailbox: str, fifo: str) -> tuple[int, str]:
    report(mailbox, os.getpid())
    return os.getpid(), wait_for_word(fifo)


def report_wait_and_leave(mailbox: str, fifo: str, code: int) -> None:
    """Like `report_and_wait`, and then exit; a negative code is a signal."""
    report_and_wait(mailbox, fifo)
    if code < 0:
        kill_myself(-code)
    os._exit(code)


def report_wait_and_leave_a_daemon(mailbox: str, fifo: str) -> NoReturn:
    report_and_wait(mailbox, fifo)
    leave_a_daemon(mailbox, 3)


# ── what a child is ─────────────────────────────────────────────────────────────────────────────


def ids() -> dict[str, int]:
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgrp(),
        "session": os.getsid(0),
    }


def descriptors() -> dict[int, str]:
    """Number and target of each open descriptor, without the one that looks for them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass
    return found


def dispositions() -> dict[str, str]:
    return {
        number.name: getattr(signal.getsignal(number), "name", "handler")
        for number in signal.Signals
    }


def signal_masks() -> dict[str, int]:
    """What /proc says is blocked, ignored and caught, as sets of bits."""
    with open("/proc/self/status") as file:
        lines = dict(line.rstrip().split(":\t", 1) for line in file if line.startswith("Sig"))
    return {name: int(lines[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}


def write_beyond_the_limit(path: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with open(path, "wb", buffering=0) as file:
        file.write(bytes(1000))
        file.write(b"x")


def oom_score_adjustment() -> int:
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())


def random_numbers() -> tuple[float, float, bytes]:
    import numpy as np

    return random.random(), float(np.random.random()), os.urandom(8)


def variables(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def variable_of_a_program(name: str) -> str:
    """What a program that the body starts sees."""
    run = subprocess.run(["printenv", name], stdout=subprocess.PIPE, text=True, check=False)
    return run.stdout.rstrip("\n")


def file_of(module: str) -> str | None:
    return importlib.import_module(module).__file__


def interpreter_state() -> dict[str, Any]:
    import multiprocessing

    from isolated_tasks.process import child

    return {
        "path": sys.path,
        "argv": sys.argv,
        "stdin": sys.stdin.read(),
        "is_child": child.is_child(),
        "gc": gc.isenabled(),
        "frozen": gc.get_freeze_count(),
        "daemon": multiprocessing.current_process().daemon,
        "process": multiprocessing.current_process().name,
        "is_mp_child": multiprocessing.parent_process() is not None,
    }


def is_child_in_a_fork() -> bool:
    from isolated_tasks.process import child

    pid = os.fork()
    if pid == 0:
        os._exit(child.is_child())
    return bool(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(out: str, err: str) -> None:
    sys.stdout.write(out)
    sys.stderr.write(err)


def siblings() -> int:
    """Living children of the forkserver, this one included."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # no process, or gone
        count += int(parent) == os.getppid() and state not in "ZX"
    return count


def hold(size: int) -> int:
    held.append(bytearray(b"x") * size)
    return os.getpid()


def hold_in_a_circle(size: int) -> int:
    """Leave behind what only the garbage collector finds."""
    circle: list[object] = [bytearray(b"x") * size]
    circle.append(circle)
    return os.getpid()


def touch(size: int) -> int:
    """Need much memory, and keep none of it."""
    _ = bytearray(b"x") * size
    return os.getpid()


# ── exit hooks ──────────────────────────────────────────────────────────────────────────────────


def register(hook: Callable[..., object], *args: object) -> str:
    atexit.register(hook, *args)
    return "registered"


def leave_a_thread(path: str, fifo: str) -> str:
    """Return while a thread that is no daemon has something to do yet."""

    def work() -> None:
        append(path, wait_for_word(fifo))

    threading.Thread(target=work).start()
    return "started"


def sleep_in_python() -> None:
    time.sleep(1000)


def sleep_in_c() -> None:
    ctypes.PyDLL(None).sleep(1000)


# ── processes of the body's own ─────────────────────────────────────────────────────────────────


def meet(fifo: str, number: int) -> int:
    """Return once the other one is here too: opening one end waits for the other."""
    os.close(os.open(fifo, os.O_RDONLY if number else os.O_WRONLY))
    return os.getpid()


def meet_in_a_pool(method: str, fifo: str) -> list[int]:
    import multiprocessing

    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.starmap(meet, [(fifo, 0), (fifo, 1)], chunksize=1)


def leave_a_pool() -> list[int]:
    import multiprocessing

    pool = multiprocessing.get_context("fork").Pool(2)
    held.append(pool)
    return [process.pid for process in pool._pool]  # type: ignore[attr-defined]


def meet_in_an_executor(method: str, fifo: str) -> list[int]:
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        return list(executor.map(meet, [fifo, fifo], [0, 1]))


def meet_in_joblib(fifo: str) -> list[int]:
    import joblib

    jobs = (joblib.delayed(meet)(fifo, number) for number in (0, 1))
    return list(joblib.Parallel(n_jobs=2)(jobs))


def use_the_standard_library() -> list[object]:
    """What gevent and eventlet patch, and what they need a hub for."""
    time.sleep(0.001)
    results: list[object] = []
    thread = threading.Thread(target=results.append, args=("thread",))
    thread.start()
    thread.join()
    results.append(subprocess.run(["sh", "-c", "exit 3"], check=False).returncode)
    return results


def tell_pid_after(body: Callable[..., object], *args: object) -> int:
    body(*args)
    return os.getpid()


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


def marks_body(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function that says itself where its body begins."""
    function.marks_body = True  # type: ignore[attr-defined]
    return function


#: What a supervisor sends, and a test may want to come at a certain place only.
_FROM_OUTSIDE = {signal.SIGTERM, signal.SIGUSR1}


@marks_body
def shielded(body: Callable[..., Any], *args: Any) -> Any:
    """Run a body that says itself from where on signals may come."""
    from isolated_tasks.process import limits

    signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_OUTSIDE)
    with limits.body():
        return body(*args)


def let_signals_come() -> None:
    """In a body that is shielded; those that have come meanwhile come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FROM_OUTSIDE)


def wait_for_signals() -> NoReturn:
    let_signals_come()
    while True:
        # Not for long: of a signal that comes just before the system call Python hears after it.
        time.sleep(0.01)


@marks_body
def begin_when_told(mailbox: str, fifo: str, body: Callable[..., Any], *args: Any) -> Any:
    """Report, wait for a word, and only then run the body, shielded."""
    from isolated_tasks.process import limits

    report(mailbox, os.getpid())
    wait_for_word(fifo)
    signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_OUTSIDE)
    with limits.body():
        return body(*args)


@marks_body
def leave_before_it_begins(code: int) -> NoReturn:
    """Exit in what comes before the body, as a hook for new processes may."""
    os._exit(code)


@marks_body
def hang_timed(mailbox: str, how: str, *, stubborn: bool = False, fifo: str = "") -> NoReturn:
    """Like `hang`, with everything done before the clock begins to run.

    Args:
        mailbox: told the pids of this process and of two grandchildren.
        how: see `hang_alone`.
        stubborn: whether all of them ignore SIGTERM.
        fifo: where to wait for a word before the body begins.
    """
    from isolated_tasks.process import limits

    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(mailbox, os.getpid(), *_grandchildren())
    if fifo:
        wait_for_word(fifo)
    with limits.body():
        if stubborn:
            # The block has put back the handlers of this process.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hang_alone(how)


def wait_for_the_soft_limit() -> tuple[int, str]:
    try:
        wait_for_signals()
    except TimeoutError:
        return os.getpid(), "handled"


class Slow:
    """A result whose pickling takes until a signal has come."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.number})
            (came,) = os.read(reader, 1)
        finally:
            signal.set_wakeup_fd(before)
            os.close(reader)
            os.close(writer)
        return int, (came,)


@marks_body
def return_before_the_signal(number: int) -> Slow:
    """Have a signal come when the body has ended and its result is on its way."""
    from isolated_tasks.process import limits

    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    with limits.body():
        return Slow(number)


@marks_body
def begin_after_a_signal(mailbox: str, body: Callable[..., Any], *args: Any) -> Any:
    """Report, wait for a signal that has a handler, and only then run the body."""
    from isolated_tasks.process import limits

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    report(mailbox, os.getpid())
    os.read(reader, 1)
    signal.set_wakeup_fd(-1)
    with limits.body():
        return body(*args)


def wait_and_clean_up(mailbox: str) -> NoReturn:
    """Be ended in the middle, and say so."""
    try:
        report(mailbox, os.getpid(), "begun")
        wait_for_signals()
    finally:
        report(mailbox, os.getpid(), "cleaned up")


def swallow_the_end(mailbox: str) -> str:
    try:
        wait_for_signals()
    except SystemExit as exc:
        report(mailbox, exc.code)
    return "as if nothing had been"


def leave_slowly(mailbox: str, fifo: str) -> NoReturn:
    """Be ended, and take until the test says so for cleaning up."""
    try:
        report(mailbox, os.getpid(), "begun")
        wait_for_signals()
    except SystemExit as exc:
        report(mailbox, os.getpid(), exc.code)
        report(mailbox, "cleaned up", wait_for_word(fifo))
        raise


def end_a_process_of_mine(how: str, number: int) -> int | None:
    """Start a process, send it a signal when it is up, and return how it ended."""
    if how == "fork":
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, b"x")
            _pause()
        os.read(reader, 1)
        os.kill(pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if how == "multiprocessing":
        import multiprocessing

        context = multiprocessing.get_context("fork")
        is_up = context.Event()
        process = context.Process(target=_say_so_and_pause, args=(is_up,))
        process.start()
        is_up.wait()
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join()
        return process.exitcode
    command = ["sh", "-c", "echo up; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        program.send_signal(number)
    return program.returncode


def _say_so_and_pause(is_up: Any) -> NoReturn:
    is_up.set()
    _pause()


def report_and_hold(mailbox: str, fifo: str, size: int) -> NoReturn:
    """Report, hold this much memory when told to, and stay."""
    report_and_wait(mailbox, fifo)
    hold(size)
    _pause()


def hold_elsewhere(mailbox: str, size: int, *, fifo: str = "") -> NoReturn:
    """Have a grandchild hold memory that has left the group; its parent, in between, has ended."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            report(mailbox, os.getpid())
            if fifo:
                wait_for_word(fifo)
            hold(size)
            _pause()
        os._exit(0)
    os.wait()
    report(mailbox, os.getpid())
    _pause()


def share(mailbox: str, fifo: str, size: int, count: int) -> str:
    """Have several processes use the same pages, and wait for the test."""
    memory = bytearray(b"x") * size
    reader, writer = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            # Read, so that it has them mapped; not written to, so that they are shared.
            memory.find(b"y")
            os.write(writer, b"x")
            _pause()
    for _ in range(count):
        os.read(reader, 1)
    return report_and_wait(mailbox, fifo)[1]


def allocate(size: int) -> int:
    memory = bytearray(size)  # the guilty line
    return len(memory)


def try_to_allocate(size: int) -> str:
    try:
        allocate(size)
    except MemoryError:
        return "MemoryError"
    return "allocated"


def try_to_hold(size: int) -> tuple[int, str]:
    """Keep it, if it can be had."""
    try:
        hold(size)
    except MemoryError:
        return os.getpid(), "MemoryError"
    return os.getpid(), "held"


class Large:
    """A result that takes much memory to pickle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (allocate(self.size),)


def return_large(size: int) -> Large:
    return Large(size)


def burn(seconds: float) -> int:
    """Use this much CPU time."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return os.getpid()


def niceness() -> tuple[int, int]:
    return os.getpid(), os.getpriority(os.PRIO_PROCESS, 0)


def highest_descriptor() -> tuple[int, int]:
    """Open files until there can be no more; the number of the last one."""
    opened: list[int] = []
    try:
        while len(opened) < 100_000:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as exc:
        if exc.errno != errno.EMFILE:
            raise
        return os.getpid(), max(opened)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    raise AssertionError("there is no limit")


# ── what a body leaves behind ───────────────────────────────────────────────────────────────────

#: How a process that is left lives, see `leave_behind`.
LEFT = ("in the group", "in a session of its own", "as a daemon")


def change_the_process(what: str) -> int:
    """Leave it other than it was, in one respect; see `CHANGES`."""
    if what == "thread":
        threading.Thread(target=_pause, name="the one", daemon=True).start()
    elif what == "process":
        held.append(subprocess.Popen(["sleep", "1000"]))
    elif what == "zombie":
        if os.fork() == 0:
            os._exit(0)
    elif what == "current directory":
        os.chdir("/")
    elif what == "signal handler":
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    elif what == "blocked signal":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    elif what == "umask":
        os.umask(0o031)
    elif what == "variable":
        os.environ["LEFT_BEHIND"] = "a secret"
    elif what == "limit":
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
    elif what == "locale":
        locale.setlocale(locale.LC_ALL, "C")
    else:
        assert what == "nothing"
    return os.getpid()


#: What `change_the_process` changes, and what is said of it.
CHANGES = {
    "thread": r"1 thread\(s\) \(the one\)",
    "process": r"1 process\(es\) \(pid \d+\)",
    "zombie": r"1 process\(es\) \(pid \d+\)",
    "current directory": r"another current directory \(/\)",
    "signal handler": r"other signal handlers \(SIGUSR2\)",
    "blocked signal": "other blocked signals",
    "umask": r"another umask \(031\)",
    "variable": r"other environment variables \(LEFT_BEHIND\)$",
    "limit": r"other limits \(RLIMIT_STACK\)",
    "locale": r"another locale \(C\)",
}


def log_by_a_queue() -> tuple[int, bool]:
    """Have a thread of `logging` in this process; tell whether it had to be started."""
    from logging.handlers import QueueListener
    from queue import SimpleQueue

    is_new = not any(isinstance(one, QueueListener) for one in held)
    if is_new:
        listener = QueueListener(SimpleQueue())
        listener.start()
        held.append(listener)
    return os.getpid(), is_new


def leave_behind(mailbox: str, how: str, ending: str, fifo: str = "") -> int:
    """Leave a process and a child of it, in a session of its own; report both, and end.

    Args:
        mailbox: where to report.
        how: one of `LEFT`.
        ending: how this process ends.
        fifo: where to wait for a word before it does.
    """
    if how == "as a daemon":
        middle = os.fork()
        if middle == 0:
            os.setsid()
            _stay_with_a_child(mailbox)
            os._exit(0)
        os.waitpid(middle, 0)
    else:
        _stay_with_a_child(mailbox, new_session=how == "in a session of its own")
    if fifo:
        wait_for_word(fifo)
    if ending == "crashes":
        crash_in_c()
    elif ending == "is killed":
        kill_myself(signal.SIGKILL)
    elif ending == "exits":
        os._exit(0)
    elif ending == "raises":
        raise LookupError(ending)
    elif ending == "waits":
        _pause()
    return os.getpid()


def leave_a_shell(script: str) -> tuple[int, int]:
    """Leave a shell behind that runs this; its pid after our own."""
    shell = subprocess.Popen(["sh", "-c", script])
    held.append(shell)  # or its __del__ would warn
    return os.getpid(), shell.pid


def leave_behind_and_wait(mailbox: str, fifo: str) -> tuple[int, str]:
    """Have a process in the group, with a child in a session of its own, until the word comes."""
    _stay_with_a_child(mailbox)
    return os.getpid(), wait_for_word(fifo)


def leave_a_program(mailbox: str, fifo: str) -> None:
    """Leave another program in the group; report its pid, and crash after a word."""
    report(mailbox, subprocess.Popen(["sleep", "1000"]).pid)
    wait_for_word(fifo)
    crash_in_c()


def _stay_with_a_child(mailbox: str, *, new_session: bool = False) -> None:
    """Fork one that forks another, and come back when both are where they are to be."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        if new_session:
            os.setsid()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.write(writer, b"x")
            _pause()
        report(mailbox, os.getpid(), child)
        os.write(writer, b"x")
        _pause()
    for _ in range(2):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)


# ── for the forkserver's own tests ──────────────────────────────────────────────────────────────


def set_up(argument: bytes) -> None:
    """A set-up function: what it is given is there for all to see."""
    os.environ["SET_UP_WITH"] = argument.decode()


def set_up_badly(argument: bytes) -> NoReturn:
    raise LookupError(f"no app {argument.decode()}")


def lower_the_hard_limit_of_files(limit: int) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def ignore_sigusr1() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return os.getpid()
