"""Tasks that describe the process around their body, and an app that sets it up in every way."""

import json
import locale
import os
import random
import resource
import sys
import time
from typing import Any

import numpy as np
from celery import _state, current_app, signals
from celery.utils.log import get_task_logger

from harness.app import make_app
from isolated_tasks import IsolatedTask
from isolated_tasks.signals import isolated_process_init, isolated_process_shutdown

app = make_app(__name__)

logger = get_task_logger(__name__)

#: Made by the import, so once for all children.
own_generator = random.Random()
new_generator = np.random.default_rng()
old_generator = np.random.RandomState()

FLAGS = ("optimize", "dev_mode", "utf8_mode", "dont_write_bytecode", "no_site", "isolated")

#: What the handlers of this process have left.
set_up: dict[str, Any] = {}


@signals.celeryd_init.connect
def _change_everything(**_: object) -> None:
    """What only the main process does: no forkserver repeats it by importing the app."""
    app.conf.changed_at_run_time = {"yes": [1, 2]}
    app.conf.task_default_priority = 3
    os.umask(0o027)
    os.environ["MADE_AT_RUN_TIME"] = "yes"
    os.environ["TZ"] = "Asia/Kathmandu"
    time.tzset()
    locale.setlocale(locale.LC_ALL, "C")
    os.chdir(os.environ["TEST_FOLDER"])
    sys.path.append(os.environ["TEST_FOLDER"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (777, 777))


def _note(path: str, event: str) -> None:
    with open(path, "a") as file:
        file.write(json.dumps([event, os.getpid()]) + "\n")


if "TEST_NOTES" in os.environ:
    notes = os.environ["TEST_NOTES"]

    @signals.worker_process_init.connect
    def _init(**_: object) -> None:
        set_up["worker_process_init"] = set_up.get("worker_process_init", 0) + 1
        logger.warning("worker_process_init in %d", os.getpid())
        _note(notes, "worker_process_init")

    @signals.worker_process_shutdown.connect
    def _shutdown(**_: object) -> None:
        _note(notes, "worker_process_shutdown")

    @isolated_process_init.connect
    def _isolated_init(**_: object) -> None:
        set_up["isolated_process_init"] = set_up.get("isolated_process_init", 0) + 1
        _note(notes, "isolated_process_init")

    @isolated_process_shutdown.connect
    def _isolated_shutdown(**_: object) -> None:
        _note(notes, "isolated_process_shutdown")


def _describe() -> dict[str, Any]:
    mask = os.umask(0)
    os.umask(mask)
    return {
        "conf": app.conf.get("changed_at_run_time"),
        "priority": app.conf.task_default_priority,
        "current_app": current_app._get_current_object() is app,
        "default_app": _state.default_app is app,
        "umask": mask,
        "environment": {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ISOLATED_TASKS", "_MP_FORK"))
        },
        "zone": [time.tzname, time.localtime(0).tm_hour],
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
        # Celery takes the current directory out of the path again, but for its last mention.
        "path": sorted(set(sys.path)),
        "argv": sys.argv,
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "priority_of_process": os.nice(0),
        "stdin": sys.stdin.read(),
        # The forkserver is started with -P, and then takes over the worker's import path.
        "flags": {name: getattr(sys.flags, name) for name in FLAGS},
        "warnings": repr(sys.warnoptions),
        "recursion": sys.getrecursionlimit(),
        "cwd_file": os.path.exists("a file of the folder"),
    }


@app.task
def plain_describe() -> dict[str, Any]:
    return _describe()


@app.task(base=IsolatedTask)
def describe() -> dict[str, Any]:
    return _describe()


@app.task(base=IsolatedTask, batch_size=2)
def set_up_by() -> dict[str, Any]:
    return {**set_up, "pid": os.getpid()}


@app.task(base=IsolatedTask)
def random_numbers() -> list[float]:
    return [
        random.random(),
        own_generator.random(),
        float(np.random.random()),
        float(new_generator.random()),
        float(old_generator.random_sample()),
        float(np.random.default_rng().random()),
    ]


def _port() -> int:
    """Our end of the connection of the app's pool, to RabbitMQ."""
    with app.pool.acquire(block=True) as connection:
        connection.connect()
        port: int = connection.connection.transport.sock.getsockname()[1]
        return port


if "TEST_CONNECT" in os.environ:
    # What an app should not do when it is imported, and some do.
    _note(os.environ["TEST_CONNECT"], f"{_port()}")


@app.task(base=IsolatedTask, batch_size=2)
def connect() -> list[int]:
    return [_port(), os.getpid()]
