"""What `test_compared.py` has other libraries run: bodies, and Celery's tasks of them."""

import concurrent.futures
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("FOLDER", "."))


def pid() -> int:
    """Of the process that runs the body."""
    return os.getpid()


def pid_of_a_child() -> int:
    """Of a process that the body has started as the standard library does."""
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("fork")
    ) as executor:
        return executor.submit(os.getpid).result()


def crash() -> None:
    """As a library in C does."""
    os.kill(os.getpid(), 11)


def hold(megabytes: int) -> int:
    """So much, all at once, and give it back."""
    return len(bytearray(megabytes << 20))


def sleep(seconds: float) -> str:
    """Longer than a limit; the file tells that the body runs."""
    (FOLDER / "runs").touch()
    time.sleep(seconds)
    return "slept"


def attributes(instance: Any) -> set[str]:
    """Public ones."""
    return {name for name in dir(instance) if not name.startswith("_")}
