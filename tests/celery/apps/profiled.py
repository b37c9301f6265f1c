"""Tasks whose memory is profiled."""

import os
import sys
from typing import Any

from celery import Task

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

#: What each body allocates in one block, in bytes: no other block is as large.
SIZE = 20 << 20

if os.environ.get("WITHOUT_MEMRAY"):
    # As if it were not installed, where children are forked.
    sys.modules["memray"] = None  # type: ignore[assignment]

kept: list[bytearray] = []


def allocate(size: int) -> None:
    kept.append(bytearray(size))  # here


@app.task(base=IsolatedTask)
def plain(size: int = SIZE) -> int:
    allocate(size)
    return os.getpid()


@app.task(base=IsolatedTask, profile="memray")
def by_memray(size: int = SIZE) -> int:
    allocate(size)
    return os.getpid()


@app.task(base=IsolatedTask, profile="tracemalloc")
def by_tracemalloc(size: int = SIZE) -> int:
    allocate(size)
    return os.getpid()


@app.task(base=IsolatedTask, profile="tracemalloc", result_serializer="json")
def encoded(size: int = SIZE) -> int:
    allocate(size)
    return os.getpid()


@app.task(base=IsolatedTask, profile="memray", name="../../profiled/./.. $(id)\n%s")
def oddly_named() -> int:
    allocate(SIZE)
    return os.getpid()


@app.task(base=IsolatedTask, profile="tracemalloc", profile_every=2)
def one_in_two() -> None: ...


@app.task(base=IsolatedTask, profile="memray")
def fail() -> None:
    allocate(SIZE)
    raise LookupError("in vain")


def hold_too_much() -> None:
    allocate(SIZE)
    while True:
        kept.append(bytearray(b"x" * (1 << 20)))


@app.task(base=IsolatedTask, profile="memray", memory_limit="150MiB")
def too_much_for_memray() -> None:
    hold_too_much()


@app.task(base=IsolatedTask, profile="tracemalloc", memory_limit="150MiB")
def too_much_for_tracemalloc() -> None:
    hold_too_much()


@app.task(base=IsolatedTask, profile="memray", batch_size=10, batch_idle_timeout=60)
def batch_by_memray(size: int) -> int:
    bytearray(size)  # in a batch
    return os.getpid()


@app.task(base=IsolatedTask, profile="tracemalloc", batch_size=10, batch_idle_timeout=60)
def batch_by_tracemalloc(size: int) -> int:
    kept[:] = []
    allocate(size)
    return os.getpid()


@app.task(base=IsolatedTask)
def fork(directory: str) -> list[str]:
    """The copy returns into our code; what has it left in the directory by its end?"""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    allocate(SIZE)
    return [name for name in os.listdir(directory) if "tracemalloc" in name]


@app.task(base=IsolatedTask, bind=True)
def retry_once(self: Task) -> Any:
    allocate(SIZE)
    if not self.request.retries:
        raise self.retry(countdown=0)
    return os.getpid()
