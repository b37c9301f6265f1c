"""What calls there are: their bodies, their options, and what may become of them undisturbed."""

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: In the environment of what a body starts and leaves: ``<pid>:<start time>`` of its child.
CHILD_VARIABLE = "SOAK_CHILD"

#: With this in the environment the tasks are Celery's own, to see whose fault something is.
PLAIN_VARIABLE = "SOAK_PLAIN"

#: How a message is acknowledged, and what that lets Celery lose: see `accounts`.
PROMISES: Mapping[str, Mapping[str, Any]] = {
    "early": {},
    "late": {"acks_late": True},
    # Given back if its pool process or its child is lost.
    "returned": {"acks_late": True, "reject_on_worker_lost": True},
}

MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One kind of call."""

    name: str
    #: How often, in comparison with the others.
    weight: float
    body: Callable[..., Any]
    #: Of the task, besides those of its promise.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: States and errors that need no cause outside of the call.
    ends: tuple[str, ...] = ("SUCCESS",)
    #: Whether plain tasks can do this in every pool. Those of threads have no limits and cannot be
    #: revoked, and one that ends its process ends the worker.
    harmless: bool = True


def quick(task: Any, token: str) -> str:
    return token[::-1]


def large(task: Any, token: str) -> str:
    """A result of 1 MiB."""
    return large_text(token)


def large_text(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest() * (MIB // 64)


def fail(task: Any, token: str) -> None:
    raise ValueError(token)


def hold(task: Any, token: str) -> int:
    """Hold memory for a while."""
    held = b"x" * (30 * MIB)
    time.sleep(0.2)
    return len(held)


def sleep(task: Any, token: str) -> None:
    time.sleep(1.5)


def long_sleep(task: Any, token: str) -> None:
    time.sleep(4)


def wait_for_revocation(task: Any, token: str) -> None:
    """Far longer than it takes a worker to stop a body, whatever happens meanwhile."""
    time.sleep(8)


def busy(task: Any, token: str) -> None:
    """Be in C, with the GIL."""
    sum(range(4 << 20))


def stubborn(task: Any, token: str) -> None:
    """Do not mind being told to end."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            time.sleep(until - time.monotonic())


def family(task: Any, token: str) -> None:
    """Start processes and leave them: in the group, in a session, and one below that."""
    me = f"{os.getpid()}:{start_time(os.getpid())}"
    environment = {**os.environ, CHILD_VARIABLE: me}
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": environment}
    subprocess.Popen(["sleep", "300"], **quiet)
    subprocess.Popen(["sleep", "300"], start_new_session=True, **quiet)
    subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300"], start_new_session=True, **quiet)
    time.sleep(0.3)


def start_time(pid: int) -> int:
    """When a process started, in the kernel's ticks: with its pid, this is one process for ever."""
    with open(f"/proc/{pid}/stat") as file:
        # proc(5): field 22; the name before it, in parentheses, may hold anything.
        return int(file.read().rpartition(")")[2].split()[19])


def leave(task: Any, token: str) -> None:
    os._exit(3)


def kill_itself(task: Any, token: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def greedy(task: Any, token: str) -> int:
    """Take more memory than it may have."""
    held = []
    while True:
        held.append(b"x" * (8 * MIB))
        time.sleep(0.005)


def launch(task: Any, token: str) -> str:
    """Send another call."""
    sent: str = task.app.send_task("quick.late", (f"{token}/launched",)).id
    return sent


def retry(task: Any, token: str) -> int:
    if task.request.retries == 0:
        # Not at once: Celery notes the retry after it has sent it, and may overwrite the end of a
        # retry that was quicker than that.
        raise task.retry(countdown=1)
    retries: int = task.request.retries
    return retries


LOST = "ChildLostError"

KINDS = {
    kind.name: kind
    for kind in (
        Kind("quick", 20, quick),
        Kind("large", 5, large),
        Kind("fail", 6, fail, ends=("ValueError",)),
        Kind("hold", 6, hold),
        Kind("sleep", 10, sleep),
        Kind("busy", 5, busy),
        Kind("batch", 20, quick, {"batch_size": 5, "batch_idle_timeout": 2.0}),
        Kind("spawn", 3, quick, {"start_method": "spawn"}),
        Kind("family", 6, family, harmless=False),
        Kind(
            "soft",
            4,
            long_sleep,
            {"soft_time_limit": 0.4},
            ("SoftTimeLimitExceeded",),
            harmless=False,
        ),
        Kind(
            "hard",
            4,
            stubborn,
            {"time_limit": 0.5},
            ("TimeLimitExceeded",),
            harmless=False,
        ),
        Kind("revoked", 5, wait_for_revocation, ends=("SUCCESS", "REVOKED"), harmless=False),
        Kind("leave", 4, leave, ends=(LOST,), harmless=False),
        Kind("kill_itself", 4, kill_itself, ends=(LOST,), harmless=False),
        Kind(
            "greedy",
            4,
            greedy,
            {"memory_limit": "96MiB"},
            ("MemoryLimitExceeded",),
            harmless=False,
        ),
        Kind("launch", 5, launch),
        Kind("retry", 4, retry),
        Kind("first", 5, quick),
        # The second of a chain whose first is of the kind before; never drawn by itself.
        Kind("second", 0, lambda task, before, token: token[::-1]),
    )
}


def is_right(kind: str, token: str, value: Any) -> bool:
    """Whether this is the result of a call of this kind with this token."""
    if kind in ("quick", "batch", "spawn", "first", "second"):
        return bool(value == token[::-1])
    if kind == "large":
        return bool(value == large_text(token))
    if kind == "launch":
        return isinstance(value, str)
    return bool(value == {"hold": 30 * MIB, "retry": 1}.get(kind))
