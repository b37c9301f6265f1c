"""Tasks that keep something, or nothing; test_testing.py measures them, in a suite of its own."""

import mmap
import os
from typing import Any

from celery import Celery

from isolated_tasks import IsolatedTask

app = Celery("leaky", set_as_current=False)

MIB = 1 << 20
kept: list[Any] = []
cache: dict[int, bytearray] = {}


@app.task
def leaks() -> None:
    kept.append(bytearray(MIB))


@app.task
def maps() -> None:
    one = mmap.mmap(-1, MIB)
    one.write(bytes(MIB))
    kept.append(one)


@app.task
def is_clean(megabytes: int = 1) -> int:
    cycle: list[Any] = [bytearray(megabytes * MIB)]
    cycle.append(cycle)
    return megabytes


@app.task
def fills(entries: int) -> None:
    if len(cache) < entries:
        cache[len(cache)] = bytearray(MIB)


@app.task
def fails() -> None:
    raise ValueError("no such luck")


@app.task
def crashes() -> None:
    os._exit(7)


@app.task
def prints() -> None:
    print("from the body", flush=True)


@app.task(base=IsolatedTask)
def leaks_in_a_child() -> None:
    kept.append(bytearray(MIB))


@app.task(base=IsolatedTask)
def pid() -> int:
    return os.getpid()


@app.task(base=IsolatedTask)
def forkserver() -> int:
    print(os.getppid(), flush=True)
    return os.getppid()


@app.task(base=IsolatedTask)
def takes(megabytes: int) -> list[int]:
    return [os.getpid(), len(bytearray(megabytes * MIB))]


class Receiver(IsolatedTask):
    abstract = True

    def on_success(self, *args: Any, **kwargs: Any) -> None:
        kept.append(bytearray(MIB))


@app.task(base=Receiver)
def leaks_in_its_hook() -> None: ...
