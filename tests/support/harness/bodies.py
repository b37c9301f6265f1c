"""What tests run in children.

Functions are pickled by reference, so they stand in a module that the forkserver can import. It is
imported by forkservers, children and their own pools, so it imports as little as it can.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
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


def append(path: str, line: object) -> int:
    """Leave a trace of this run, in one write."""
    with open(path, "a") as file:
        file.write(f"{line}\n")
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


def send_an_outcome_and_nonsense() -> None:
    """Have both arrive at once."""
    from isolated_tasks.process import pickling, protocol
    from isolated_tasks.process.outcome import Outcome

    pickled = pickling.dumps(Outcome(value="it stands"))
    frame = protocol.encode(protocol.Outcome(pickled.body, pickled.buffers))
    os.write(call_socket(), b"".join(map(bytes, frame)) + b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(1000)


def talk_nonsense_and_leave(code: int) -> NoReturn:
    talk_nonsense()
    os._exit(code)


def talk_nonsense_later(mailbox: str, fifo: str) -> int:
    """Do so from a thread, when the call is over."""

    def work() -> None:
        wait_for_word(fifo)
        talk_nonsense()
        report(mailbox, "done")

    threading.Thread(target=work, daemon=True).start()
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


def leave_a_daemon(mailbox: str, code: int) -> NoReturn:
    """Exit while a grandchild in a session of its own holds all our descriptors."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(writer, b"x")
        report(mailbox, os.getpid())
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
    report(mailbox, os.getpid(), *_grandchildren())
    while True:
        if how == "asleep":
            time.sleep(1000)
        elif how == "spinning":
            pass
        elif how == "stuck in C":
            ctypes.PyDLL(None).sleep(1000)  # PyDLL: the GIL is held meanwhile
        elif how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise ValueError(how)


def wait_for_word(fifo: str) -> str:
    """Return what somebody writes into the fifo, once somebody does."""
    with open(fifo) as file:
        return file.read()


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
        number.name: getattr(handler := signal.getsignal(number), "name", repr(handler))
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


# ── for the forkserver's own tests ──────────────────────────────────────────────────────────────


def set_up(argument: bytes) -> None:
    """A set-up function: what it is given is there for all to see."""
    os.environ["SET_UP_WITH"] = argument.decode()


def set_up_badly(argument: bytes) -> NoReturn:
    raise LookupError(f"no app {argument.decode()}")
