#!/usr/bin/env python3
"""Ways to use memory and let go of it, one of them in this very process.

    python examples/ways_to_use_memory.py small_pinned 100000000

prints what is resident above what was before, in bytes, at each point: the peak, after the last
reference has gone, after `gc.collect()`, after `malloc_trim(0)`; and in a process whose child has
done the same and has exited. `where_memory_goes.py` runs each in a process of its own. Nothing is
imported that would be in the way.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import Any

MEGABYTE = 1_000_000

#: What a process still holds when it is done: a cache, a registry, the state of a library.
kept: list[Any] = []


# ── ways to use memory ──────────────────────────────────────────────────────────────────────────
# Each is called with a number of bytes and with what is to be called at the peak, and has let go of
# all but what is in `kept` when it returns.

Peak = Callable[[], None]
Way = Callable[[int, Peak], None]


def block(size: int) -> bytes:
    """Bytes that are made when this is called, and written to."""
    return b"x" * size


def large(size: int, peak: Peak) -> None:
    """one block"""
    one = block(size)
    peak()
    del one


def small(size: int, peak: Peak) -> None:
    """objects of 400 bytes"""
    objects = [bytes(400) for _ in range(size // 456)]
    peak()
    del objects


def small_pinned(size: int, peak: Peak) -> None:
    """objects of 400 bytes, one in 1,000 is kept"""
    objects = [bytes(400) for _ in range(size // 456)]
    peak()
    kept[:] = objects[::1000]


def blocks(size: int, peak: Peak) -> None:
    """blocks of 4 KB"""
    objects = [block(4000) for _ in range(size // 4056)]
    peak()
    del objects


def blocks_pinned(size: int, peak: Peak) -> None:
    """blocks of 4 KB, one in 100 is kept"""
    objects = [block(4000) for _ in range(size // 4056)]
    peak()
    kept[:] = objects[::100]


def several(size: int, peak: Peak) -> None:
    """five blocks"""
    objects = [block(size // 5) for _ in range(5)]
    peak()
    del objects


def several_later(size: int, peak: Peak) -> None:
    """five blocks, after a somewhat larger one was freed"""
    # glibc's mmap threshold rises to the size of a block that is freed, its trim threshold to twice
    # that (mallopt(3)).
    larger = block(size // 5 + MEGABYTE)
    del larger
    several(size, peak)


def threads(size: int, peak: Peak) -> None:
    """the same, an eighth in each of eight threads, one after the other"""
    turns = [threading.Event() for _ in range(8)]
    done = [threading.Event() for _ in range(8)]
    end = threading.Event()

    def work(number: int) -> None:
        turns[number].wait()
        objects = [block(4000) for _ in range(size // 8 // 4040)]
        if number == 7:
            peak()
        kept.append(objects[::100])
        del objects
        done[number].set()
        # A thread that has ended leaves its arena to the next.
        end.wait()

    team = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in team:
        thread.start()
    for turn, finished in zip(turns, done, strict=True):
        turn.set()
        finished.wait()
    end.set()
    for thread in team:
        thread.join()


def cycles(size: int, peak: Peak) -> None:
    """blocks that only cycles refer to"""
    for _ in range(100):
        one: dict[str, Any] = {"block": block(size // 100)}
        one["self"] = one
    del one
    peak()


def library(size: int, peak: Peak) -> None:
    """pages in SQLite's cache, with the connection open"""
    link = sqlite3.connect("")  # a temporary file of SQLite's own
    kept.append(link)
    link.execute(f"PRAGMA cache_size = -{size // 1000}")
    link.execute("CREATE TABLE t (b BLOB)")
    link.executemany("INSERT INTO t VALUES (?)", ((block(3500),) for _ in range(size // 4400)))
    link.execute("SELECT sum(length(b)) FROM t").fetchone()
    peak()


WAYS: tuple[Any, ...] = (
    large,
    small,
    small_pinned,
    blocks,
    blocks_pinned,
    threads,
    several,
    several_later,
    cycles,
    library,
)


# ── one process ─────────────────────────────────────────────────────────────────────────────────


def resident() -> int:
    """RSS of this process, exactly: the kernel's quick count (statm) is off by some pages."""
    with open("/proc/self/smaps_rollup") as file:
        (kilobytes,) = (line.split()[1] for line in file if line.startswith("Rss:"))
    return int(kilobytes) * 1024


def trim() -> bool:
    """Call malloc_trim(3); whether this libc has it."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function(0)
    return function is not None


def in_this_process(way: Way, size: int) -> dict[str, int]:
    """What is resident, above what was before, at each point."""
    trim()  # loads what it takes
    gc.collect()
    before = resident()
    found = {}

    def peak() -> None:
        found["peak"] = resident() - before

    way(size, peak)
    found["del"] = resident() - before
    gc.collect()
    found["gc.collect()"] = resident() - before
    if trim():
        found["malloc_trim(0)"] = resident() - before
    return found


def in_a_child(way: Way, size: int) -> int:
    """What is resident here, above what was before, after a child has done it and has exited."""
    before = resident()
    pid = os.fork()
    if pid == 0:
        way(size, lambda: None)
        os._exit(0)
    os.waitpid(pid, 0)
    return resident() - before


def run_one(name: str, size: int) -> None:
    way = next(way for way in WAYS if way.__name__ == name)
    child = in_a_child(way, size)
    print(json.dumps({**in_this_process(way, size), "a child that exits": child}))


def free_lists() -> None:
    """Have CPython print what its free lists hold, with as much in them as there is room for."""
    floats = [float(number) for number in range(100_000)]
    tuples = [(number, number) for number in range(100_000)]
    lists = [[number] for number in range(100_000)]
    dicts = [{number: number} for number in range(100_000)]
    del floats, tuples, lists, dicts
    sys._debugmallocstats()


def main() -> None:
    name, *size = sys.argv[1:]
    if name == "--free-lists":
        free_lists()
    else:
        run_one(name, int(size[0]))


if __name__ == "__main__":
    main()
