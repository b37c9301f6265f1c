"""Runs isolated tasks without a worker, and writes what came of it: ``eager.py HOW_TO_END``."""

import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

from celery.canvas import xmap

from harness.app import make_app
from isolated_tasks import IsolatedTask

in_place = importlib.import_module("in_place")  # beside this one, which type checkers do not know

here = make_app("eager")


@here.task(base=IsolatedTask)
def of_this_script(number: int) -> list[int]:
    return [number * FACTOR, os.getpid()]


FACTOR = 7


def main() -> dict[str, Any]:
    for app in (here, in_place.app):
        app.conf.isolated_eager = True
    seen: dict[str, Any] = {
        "self": os.getpid(),
        "function": in_place.unsaid(),
        "apply": in_place.unsaid.apply().get(),
        "never": in_place.never.apply().get(),
        "map": xmap(in_place.pid_for.s(), [1, 2], app=in_place.app).apply().get(),
        "nested": in_place.apply_another.apply().get(),
        "retry": in_place.retry_until.apply((2,)).get(),
        "script": of_this_script.apply((3,)).get(),
    }
    failure = in_place.fail.apply()
    seen["failure"] = [repr(failure.result), failure.traceback]
    refused = in_place.take.apply((1, {"conn": [threading.Lock()]}))
    seen["refused"] = [type(refused.result).__name__, str(refused.result)]
    in_place.app.conf.task_always_eager = True
    seen["always eager"] = in_place.unsaid.delay().get()
    return seen


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[1] == "raising":
        raise ValueError("the end")
