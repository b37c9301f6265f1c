"""Looks at workers from outside: remote control, and the `celery` program."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from harness.processes import PATIENCE
from harness.worker import Worker
from harness.workplace import Workplace


def inspect(worker: Worker, *, timeout: float = PATIENCE) -> dict[str, Any]:
    """What a worker answers to ``celery inspect isolated``."""
    asking = worker.app.control.inspect(destination=[worker.name], timeout=timeout)
    answer: dict[str, Any] = asking._request("isolated")[worker.name]
    return answer


def inspect_until(worker: Worker, predicate: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Ask until the answer is of that kind: nobody tells when it would be."""
    tick = threading.Event()
    deadline = time.monotonic() + PATIENCE
    while not predicate(answer := inspect(worker)):
        assert time.monotonic() < deadline, answer
        tick.wait(0.05)
    return answer


def environment(
    workplace: Workplace, variables: Mapping[str, str], **settings: Any
) -> dict[str, str]:
    """That of a program which uses the same app as the workers of a test."""
    path = [*map(str, workplace.path), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **workplace.settings(**settings).environ(),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "FOLDER": str(workplace.folder),
        "COLUMNS": "250",
        **variables,
    }


def command(module: str, *arguments: str) -> list[str]:
    """``celery -A module …``."""
    return [sys.executable, "-m", "celery", "-A", module, *arguments]


def celery(
    workplace: Workplace,
    module: str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    **settings: Any,
) -> "subprocess.CompletedProcess[str]":
    """Run ``celery -A module …`` to its end, with `settings` of `Workplace.settings`."""
    return subprocess.run(
        command(module, *arguments),
        env=environment(workplace, variables or {}, **settings),
        cwd=workplace.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
