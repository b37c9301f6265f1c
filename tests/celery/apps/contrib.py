"""Runs a worker in a thread, as users' tests do, and writes what came of it."""

import importlib
import json
import os

import celery.contrib.testing.tasks  # noqa: F401  the ping of start_worker
from celery.contrib.testing.worker import start_worker

in_place = importlib.import_module("in_place")  # beside this one, which type checkers do not know


def main() -> None:
    in_place.app.set_default()
    seen = []
    for pool in ("solo", "threads"):
        with start_worker(in_place.app, pool=pool, perform_ping_check=False):
            isolated = in_place.unsaid.delay().get(timeout=30)
            seen.append([os.getpid(), in_place.plain.delay().get(timeout=30), isolated])
        # Stopped with the worker.
        assert not os.path.exists(f"/proc/{isolated['parent']}"), "the forkserver is still there"
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
