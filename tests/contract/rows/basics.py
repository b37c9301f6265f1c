"""What comes back from a task, and what is called meanwhile."""

import logging
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger

from contract.recorder import note
from contract.table import Row, task

task_logger = get_task_logger(__name__)
other_logger = logging.getLogger("somewhere.else")

SUCCESS_SIGNALS = [
    "task_received",
    "task_prerun",
    "before_start",
    "on_success",
    "task_success",
    "after_return",
    "task_postrun",
]
FAILURE_SIGNALS = [
    "task_received",
    "task_prerun",
    "before_start",
    "on_failure",
    "task_failure",
    "after_return",
    "task_postrun",
]


@task()
def add(x: Any, y: Any) -> Any:
    note("adding", x, y)
    return x + y


@task(hooks=False)
def add_without_hooks(x: Any, y: Any) -> Any:
    return x + y


def helper_that_fails(key: str) -> NoReturn:
    raise LookupError(key, 3)


@task()
def fail(key: str) -> NoReturn:
    helper_that_fails(key)


@task(bind=True, max_retries=3)
def retry_until(self: Task, retries: int) -> int:
    note(self.request.retries)
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True)
def launch(self: Task, *, and_fail: bool) -> str:
    add.on(self.app).delay(10, and_fail)
    add.on(self.app).delay(20, and_fail)
    if and_fail:
        raise LookupError("after launching")
    return "launched"


@task()
def ignore() -> NoReturn:
    raise Ignore("for a reason")


@task(bind=True)
def talk(self: Task) -> None:
    task_logger.warning("by a task logger")
    task_logger.debug("too quiet")
    other_logger.error("%s: by another logger", self.request.id)
    print(f"{self.request.id}: printed")


@task(ignore_result=True)
def add_and_ignore(x: int, y: int) -> int:
    return x + y


@task(bind=True)
def update(self: Task) -> None:
    self.update_state(state="HALFWAY", meta={"done": 50})
    raise Ignore


ROWS = [
    Row(
        "a result comes back",
        lambda app: add.on(app).delay(1, 2),
        expects={
            "state": "SUCCESS",
            "result": 3,
            "runs": 1,
            "tasks": 1,
            "signals": SUCCESS_SIGNALS,
            "events": ["task-received", "task-sent", "task-started", "task-succeeded"],
            "log": r"succeeded in <time>s: 3",
            "notes": ["'adding'", "1", "2"],
            "left": 0,
        },
    ),
    Row(
        "a task without hooks",
        lambda app: add_without_hooks.on(app).delay(1, y=2),
        expects={"state": "SUCCESS", "result": 3},
    ),
    Row(
        "an exception comes back with its traceback",
        lambda app: fail.on(app).delay("key"),
        expects={
            "state": "FAILURE",
            "error": "LookupError",
            "message": r"key.*3",
            "trace": r"in helper_that_fails\n    raise LookupError\(key, 3\)",
            "log": r"raised unexpected: LookupError\('key', 3\)",
            "signals": FAILURE_SIGNALS,
            "events": ["task-failed", "task-received", "task-sent", "task-started"],
        },
    ),
    Row(
        "arguments that do not fit the body",
        lambda app: app.send_task("basics.add", (1,)),
        expects={"state": "FAILURE", "error": "TypeError", "runs": 1},
    ),
    Row(
        "arguments that do not fit are refused in the client",
        lambda app: add.on(app).delay(1),
        expects={"sent": "raised <builtins.TypeError>", "tasks": 0},
    ),
    Row(
        "a task that nobody knows",
        lambda app: app.send_task("basics.unknown"),
        expects={"state": "FAILURE", "error": "NotRegistered", "signals": ["task_unknown"]},
    ),
    Row(
        "a retry that succeeds",
        lambda app: retry_until.on(app).delay(2),
        expects={"state": "SUCCESS", "result": 2, "runs": 3, "notes": ["0", "1", "2"]},
    ),
    Row(
        "a body launches tasks",
        lambda app: launch.on(app).delay(and_fail=False),
        expects={"state": "SUCCESS", "children": 2, "tasks": 3},
        trap=7,
    ),
    Row(
        "a body launches tasks and fails",
        lambda app: launch.on(app).delay(and_fail=True),
        expects={"state": "FAILURE", "children": 2, "tasks": 3},
        trap=7,
    ),
    Row(
        "Ignore leaves no result",
        lambda app: ignore.on(app).delay(),
        expects={"state": "STARTED", "runs": 1, "log": "ignored"},
    ),
    Row(
        "what a body logs",
        lambda app: talk.on(app).delay(),
        expects={"state": "SUCCESS", "log": r"(?s)by a task logger.*by another logger.*printed"},
    ),
    Row(
        "a task that ignores its result",
        lambda app: add_and_ignore.on(app).delay(1, 2),
        expects={"state": None, "runs": 1, "log": "succeeded in"},
    ),
    Row(
        "a state of its own",
        lambda app: update.on(app).delay(),
        expects={"state": "HALFWAY", "result": {"done": 50}},
    ),
    Row(
        "a call in the client",
        lambda app: add.on(app)(1, 2),
        expects={"sent": "^3$", "tasks": 0},
    ),
    Row(
        "apply in the client",
        lambda app: add.on(app).apply((1, 2)).get(),
        expects={"sent": "^3$", "notes": ["'adding'", "1", "2"]},
    ),
]
