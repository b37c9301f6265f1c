"""The only module that knows which kernel this is.

Each function is ordinary to call and says in its docstring what it does where the kernel lacks the
feature. Features are looked for, not versions. `features` lists what is in force here.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has none of it
import _socket
import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import psutil

__all__ = [
    "MAXRSS_UNIT_BYTES",
    "accept",
    "arm_lifeline",
    "become_subreaper",
    "child_exit",
    "close_descriptors_except",
    "crash_file",
    "describe_exit",
    "disarm_lifeline",
    "exact_rss_bytes",
    "features",
    "has_children",
    "interpreter",
    "is_closed_by_peer",
    "lacking",
    "malloc_bytes_and_holes",
    "open_pidfd",
    "peak_and_rss_bytes",
    "peer_uid",
    "pidfd_exit_code",
    "poll",
    "prefer_for_oom_kill",
    "read_crash_file",
    "read_file",
    "reset_peak_rss",
    "rss_bytes",
    "signal_child",
    "signal_group",
    "signal_name",
    "signal_pidfd",
    "sockets",
    "thread_count",
    "uses_cuda",
    "wait_for",
]

# What forkserver and child use, bound here before a preload gets the chance to replace it: gevent's
# and eventlet's own would run a hub in the forkserver, wait in it, and take SIGCHLD for themselves.
# poll is None in a worker that eventlet has patched, which takes it away.
poll: Any = getattr(select, "poll", None)
fork = os.fork
posix_spawn = os.posix_spawn
read = os.read
waitpid = os.waitpid
waitid = os.waitid
# Those of `signal` turn each number and each handler into a member of an enum.
getsignal = _signal.getsignal
set_signal = _signal.signal
SIG_DFL, SIG_IGN = _signal.SIG_DFL, _signal.SIG_IGN
_Socket = socket.socket
_AF_UNIX, _SOCK_STREAM = int(socket.AF_UNIX), int(socket.SOCK_STREAM)

IS_LINUX = sys.platform.startswith("linux")

#: ``ru_maxrss`` counts KiB on Linux and FreeBSD, bytes on macOS (getrusage(2)).
MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

# fcntl(2). Python names O_ASYNC and the F_ constants only where the C headers have them.
_F_SETSIG: int | None = getattr(fcntl, "F_SETSIG", 10 if IS_LINUX else None)
_F_SETOWN: int | None = getattr(fcntl, "F_SETOWN", 8 if IS_LINUX else None)
_O_ASYNC: int | None = getattr(os, "O_ASYNC", 0o20000 if IS_LINUX else None)

# prctl(2), linux/prctl.h.
_PR_SET_CHILD_SUBREAPER = 36
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if IS_LINUX else None

# linux/pidfd.h: _IOWR(0xFF, 11, struct pidfd_info) with the 64 bytes of its first version.
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_INFO_EXIT = 1 << 3
# linux/pidfd.h, Linux 6.9.
_PIDFD_SIGNAL_PROCESS_GROUP = 1 << 2


# ── waiting, in a process that does nothing else meanwhile ──────────────────────────────────────

# poll(2). Numbers, because eventlet takes some of the names away together with the function.
POLL_READ = 0x001
POLL_WRITE = 0x004
POLL_CLOSED = 0x008 | 0x010 | 0x020


def wait_for(
    descriptor: int, event: int = POLL_READ, timeout: float | None = None
) -> list[tuple[int, int]]:
    """Block until something can be done with a descriptor.

    Args:
        descriptor: Which.
        event: ``POLL_READ`` or ``POLL_WRITE``.
        timeout: In seconds; None waits without end.

    Returns:
        What ``poll.poll`` returns: empty if the time was over.
    """
    poller = poll()
    poller.register(descriptor, event)
    return poller.poll(None if timeout is None else timeout * 1000)  # type: ignore[no-any-return]


# ── the lifeline ────────────────────────────────────────────────────────────────────────────────


def arm_lifeline(descriptor: int, *, group: int) -> bool:
    """Have the kernel kill a process group when the other end of a pipe is closed.

    ``F_SETOWN`` names the group, ``F_SETSIG`` the signal and ``O_ASYNC`` asks for it whenever the
    descriptor becomes readable, which closing the only writing end makes it (fcntl(2), "Signals").
    Nobody's code runs for that, so it also takes a group that is stopped or stuck in C. Nothing may
    ever be written to the pipe. The caller has to look at `is_closed_by_peer` afterwards: what
    happened before the arming sends no signal.

    Args:
        descriptor: The reading end.
        group: The process group, which has to be the caller's own or one it may signal.

    Returns:
        Whether the kernel does this; where not, the forkserver's watch over the control socket
        is what ends the child of a dead requester.
    """
    if _F_SETSIG is None or _F_SETOWN is None or _O_ASYNC is None:
        return False
    try:
        fcntl.fcntl(descriptor, _F_SETOWN, -group)
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_ASYNC)
    except OSError:
        return False
    return True


def disarm_lifeline(descriptor: int) -> None:
    """Take back what `arm_lifeline` asked for."""
    if _O_ASYNC is not None:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_O_ASYNC)


def accept(listener: socket.socket) -> socket.socket:
    """``listener.accept()`` for a Unix socket, without making enums of numbers that are known.

    Raises:
        OSError: As ``accept``.
    """
    descriptor, _ = listener._accept()  # type: ignore[attr-defined]
    return _Socket(_AF_UNIX, _SOCK_STREAM, 0, fileno=descriptor)


def is_closed_by_peer(descriptor: int) -> bool:
    """Whether the other end of a pipe or socket is gone."""
    return any(event & POLL_CLOSED for _, event in wait_for(descriptor, POLL_READ, 0))


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def interpreter(module: str) -> list[str]:
    """The command that runs one of our modules as this interpreter would be run again."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # `-m` alone puts the current directory first on the import path, before the standard library.
    if sys.version_info >= (3, 11):
        return [sys.executable, *flags, "-P", "-m", module]
    # Python 3.10 has no -P. The folder of a file that is run comes first just so, but that is ours.
    spec = importlib.util.find_spec(module)
    return [sys.executable, *flags, str(spec.origin if spec else module)]


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where there are none.

    Linux 5.3 (pidfd_open(2)).
    """
    opener = getattr(os, "pidfd_open", None)
    if opener is None:
        return None
    try:
        descriptor: int = opener(pid)
    except OSError:
        return None
    return descriptor


def pidfd_exit_code(pidfd: int) -> int | None:
    """The exit code of a process that has ended and is not ours to reap; None where nobody tells.

    proc(5) tells it until its new parent has reaped it, and Linux 6.15 afterwards.
    """
    code = _zombie_exit_code(pidfd)
    return _reaped_exit_code(pidfd) if code is None else code


def _zombie_exit_code(pidfd: int) -> int | None:
    """``/proc/PID/stat``, field 52; None where the process has been reaped."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}") as file:
            pid = next((line.split()[1] for line in file if line.startswith("Pid:")), "-1")
        with open(f"/proc/{pid}/stat") as file:
            # From field 3 on, the state: the name before it may hold anything.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == "Z" else None


def _reaped_exit_code(pidfd: int) -> int | None:
    """``PIDFD_GET_INFO`` with ``PIDFD_INFO_EXIT``; None where the process is there, or unknown."""
    request = bytearray(_PIDFD_INFO.size)
    struct.pack_into("=Q", request, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
    except OSError:
        return None
    values = _PIDFD_INFO.unpack(request)
    if not values[0] & _PIDFD_INFO_EXIT:
        return None
    return os.waitstatus_to_exitcode(values[-1])


def signal_pidfd(pidfd: int, number: int, *, to_group: bool) -> bool:
    """Send a signal to a process, or to the group that it leads; False where that cannot be done.

    Linux 5.1, for a group 6.9 (pidfd_send_signal(2), ``PIDFD_SIGNAL_PROCESS_GROUP``). For a process
    that is not our child: its number alone might by now be a stranger's.
    """
    sender = getattr(signal, "pidfd_send_signal", None)
    if sender is None:
        return False
    try:
        sender(pidfd, number, None, _PIDFD_SIGNAL_PROCESS_GROUP if to_group else 0)
    except OSError:
        return False
    return True


def signal_child(pid: int, number: int, *, to_group: bool) -> None:
    """Send a signal to a child of ours, or to the group that it leads, if it is still there."""
    if to_group:
        signal_group(pid, number)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def become_subreaper() -> bool:
    """Be the new parent of every descendant that loses its own.

    prctl(2), ``PR_SET_CHILD_SUBREAPER``; Linux 3.4. Not inherited by children.

    Returns:
        Whether the kernel does this; where not, a process that a body has put into a session of
        its own outlives the child.
    """
    return _prctl is not None and _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def has_children() -> bool:
    """Whether this process has any child, one that has exited and was not reaped included."""
    try:
        waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def signal_name(exit_code: int | None) -> str | None:
    """The signal that ended a process, by name; None where none did."""
    if exit_code is None or exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def describe_exit(exit_code: int | None) -> str:
    """How a process ended, in words that follow its name."""
    name = signal_name(exit_code)
    if name == "SIGKILL":
        return "was killed by SIGKILL, possibly by the kernel's out-of-memory killer,"
    if name is not None:
        return f"was killed by {name}"
    if exit_code is None:
        return "ended, nobody can tell how (its parent was not there to see it),"
    return f"ended itself with exit code {exit_code}"


def child_exit() -> int | None:
    """The pid of a child of ours that has exited, which stays unreaped; None if there is none.

    Raises:
        ChildProcessError: There are no children at all.
    """
    result = waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return result.si_pid if result is not None and result.si_pid else None


def thread_count() -> int:
    """Native threads of this process; 1 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def prefer_for_oom_kill(adjustment: int = 500) -> None:
    """Have the kernel's out-of-memory killer take this process before those with less.

    Raising the value needs no privilege (proc(5), ``oom_score_adj``). Does nothing elsewhere.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
        current = int(file.read())
        file.write(b"%d" % min(1000, max(current, 0) + adjustment))


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


def reset_peak_rss() -> bool:
    """Let the high-water mark of this process begin at what it holds now.

    A forked process starts with the mark of its parent, so that ``ru_maxrss`` would report the
    forkserver's. Linux (proc(5), ``clear_refs``, value 5); elsewhere nothing happens.
    """
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, b"5")
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def rss_bytes() -> int:
    """Resident memory of this process, in bytes."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        rss: int = psutil.Process().memory_info().rss
        return rss
    try:
        return int(os.read(descriptor, 256).split()[1]) * _PAGE_SIZE
    finally:
        os.close(descriptor)


def peak_and_rss_bytes() -> tuple[int, int]:
    """High-water mark of resident memory since `reset_peak_rss`, and what there is now, in bytes.

    proc(5), ``VmHWM`` and ``VmRSS`` of ``/proc/self/status``, which are of one moment. Elsewhere
    the mark is that of the whole life of the process, and cannot be reset.
    """
    found = {}
    for line in read_file("/proc/self/status").splitlines():
        name, _, value = line.partition(b":")
        if name in (b"VmHWM", b"VmRSS"):
            found[name] = int(value.split()[0]) * 1024
    if len(found) == 2:
        return found[b"VmHWM"], found[b"VmRSS"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT_BYTES
    return peak, rss_bytes()


class _Mallinfo2(ctypes.Structure):
    # mallinfo(3).
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo2 is not None:
    _mallinfo2.restype = _Mallinfo2
    _mallinfo2.argtypes = []


def malloc_bytes_and_holes() -> tuple[int, int] | None:
    """What this process has from ``malloc`` and has not given back, and the number of free pieces.

    glibc 2.33 (mallinfo(3)). It walks the lists of the free pieces, at some 30 ns each. What
    another allocator has handed out, Python's own and jemalloc among them, does not count.

    Returns:
        Bytes, and pieces; None where nobody tells.
    """
    if _mallinfo2 is None:
        return None
    info = _mallinfo2()
    return info.uordblks + info.hblkhd, info.ordblks


# ── descriptors ─────────────────────────────────────────────────────────────────────────────────


def close_descriptors_except(keep: Iterable[int]) -> None:
    """Close every descriptor of this process but these."""
    start = 0
    for descriptor in sorted(set(keep)):
        # Never an empty range: close_range(2) takes the -1 that it ends with for all there are.
        if start < descriptor:
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def crash_file() -> int:
    """An unnamed file in memory, for what a process writes as it crashes.

    memfd_create(2); elsewhere a temporary file that is unlinked at once.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("isolated_tasks-crash")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read_crash_file(descriptor: int, limit: int = 64 * 1024) -> str:
    """What the process wrote, at most the last ``limit`` bytes."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, limit, max(0, size - limit)).decode(errors="replace")


def peer_uid(connection: socket.socket) -> int | None:
    """The user id of the process at the other end of a Unix socket; None where nobody tells.

    ``SO_PEERCRED`` (unix(7)). Elsewhere the private directory of the socket is the only guard.
    """
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def exact_rss_bytes() -> int:
    """The resident memory of this process, counted page by page, which takes a while."""
    for line in read_file("/proc/self/smaps_rollup").splitlines():
        if line.startswith(b"Rss:"):
            return int(line.split()[1]) * 1024
    return rss_bytes()


def uses_cuda() -> bool:
    """Whether this process has initialised CUDA.

    CUDA opens ``/dev/nvidia-uvm`` when it is initialised and not when it is only loaded or asked
    for the number of devices through NVML.
    """
    for descriptor in _listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/dev/nvidia-uvm"):
                return True
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    return bool(is_initialized and is_initialized())


def sockets() -> dict[int, str]:
    """The connections that this process has open, and what it listens on: inode and addresses.

    Not pairs without a name, as event loops have them to wake themselves.
    """
    found = {}
    for descriptor in _listdir("/proc/self/fd"):
        # It may be the listing's own, closed by now. Not socket.socket, which gevent replaces.
        with contextlib.suppress(OSError):
            status = os.fstat(int(descriptor))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            one = _socket.socket(fileno=os.dup(int(descriptor)))
            try:
                ends = [_address(one.getsockname), _address(one.getpeername)]
            finally:
                one.close()
            named = [end for end in ends if end]
            if named:
                found[status.st_ino] = " to ".join(named)
    return found


def _address(ask: Callable[[], object]) -> str:
    try:
        address = ask()
    except OSError:
        # It listens.
        return ""
    if isinstance(address, tuple):
        return ":".join(map(str, address[:2]))
    # A name in no file system has NULs in it (unix(7)); as `ss` shows it.
    return os.fsdecode(address).replace("\0", "@") if isinstance(address, str | bytes) else ""


def read_file(path: str, size: int | None = None) -> bytes:
    """What a file of the kernel's says, up to a size; nothing if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        if size is not None:
            return os.read(descriptor, size)
        # One read gives no more than a page.
        pieces = []
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    except OSError:
        # The process has ended in between (ESRCH).
        return b""
    finally:
        os.close(descriptor)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


# ── what is in force ────────────────────────────────────────────────────────────────────────────


def features() -> dict[str, bool]:
    """Which of the kernel's features were found, by name."""
    pidfd = open_pidfd(os.getpid())
    try:
        return {
            "lifeline": _probe_lifeline(),
            "pidfd": pidfd is not None,
            "pidfd_group_signal": pidfd is not None and signal_pidfd_probe(pidfd),
            "peer_credentials": hasattr(socket, "SO_PEERCRED"),
            "peak_reset": os.access("/proc/self/clear_refs", os.W_OK),
        }
    finally:
        if pidfd is not None:
            os.close(pidfd)


#: What is done without each, for the log.
FALLBACKS = {
    "lifeline": "what its requester leaves is ended by the forkserver, some moments later",
    "pidfd": "how a child ends whose forkserver has died is not known",
    "pidfd_group_signal": "groups are signalled by the forkserver",
    "peer_credentials": "the forkserver's private directory is its only guard",
    "peak_reset": "peaks of memory include what the forkserver has loaded",
}


def lacking() -> list[str]:
    """What this kernel does not have, and what is done without it; a line for each."""
    return [f"no {name}: {FALLBACKS[name]}" for name, found in features().items() if not found]


def signal_pidfd_probe(pidfd: int) -> bool:
    """Whether the kernel knows the flag that `signal_pidfd` needs for a group; 0 harms nobody."""
    try:
        signal.pidfd_send_signal(pidfd, 0, None, _PIDFD_SIGNAL_PROCESS_GROUP)
    except OSError as exc:
        return exc.errno not in (errno.EINVAL, errno.ENOSYS)
    return True


def _probe_lifeline() -> bool:
    if _F_SETSIG is None or _F_SETOWN is None or _O_ASYNC is None:
        return False
    reader, writer = os.pipe()
    try:
        # Our own group must not be named here: a mistake would be fatal. Asking what the kernel
        # stored for a harmless signal is enough to know that it has the command.
        fcntl.fcntl(reader, _F_SETSIG, signal.SIGIO)
    except OSError:
        return False
    finally:
        os.close(reader)
        os.close(writer)
    return True
