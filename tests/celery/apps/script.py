"""A program whose app and tasks no other process can import: ``python script.py worker``."""

import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from celery import Task

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app("script")

PREFIX = "hello"
WORDS = {"en": "world"}


@dataclass
class Thing:
    size: int

    def grown(self) -> "Thing":
        return Thing(self.size + 1)


class Trouble(Exception):
    def __init__(self, what: str, number: int) -> None:
        super().__init__(what, number)
        self.number = number


def greet(word: str) -> str:
    return f"{PREFIX} {_shout(word)}"


def _shout(word: str) -> str:
    return word.upper()


@app.task(base=IsolatedTask)
def use_helpers(language: str) -> list[object]:
    return [greet(WORDS[language]), os.getpid(), os.getppid()]


@app.task(base=IsolatedTask, start_method="spawn")
def use_helpers_when_spawned(language: str) -> list[object]:
    return [greet(WORDS[language]), os.getpid(), os.getppid()]


@app.task(base=IsolatedTask, batch_size=3, batch_idle_timeout=60.0)
def use_helpers_in_batch(language: str) -> list[object]:
    return [greet(WORDS[language]), os.getpid(), os.getppid()]


@app.task
def slot_pid() -> int:
    return os.getpid()


@app.task(base=IsolatedTask, bind=True)
def bound(self: Task) -> dict[str, Any]:
    return {
        "id": self.request.id,
        "name": self.name,
        "same": self is app.tasks[self.name],
        "app": [self.app.main, self.app is app, self.app.conf.task_default_queue],
    }


@app.task(base=IsolatedTask)
def ping(mailbox: str, depth: int) -> str:
    """Send the other, which sends this one."""
    if depth:
        pong.delay(mailbox, depth - 1)
    bodies.report(mailbox, "ping", depth)
    return "ping"


@app.task(base=IsolatedTask)
def pong(mailbox: str, depth: int) -> str:
    if depth:
        ping.delay(mailbox, depth - 1)
    bodies.report(mailbox, "pong", depth)
    return "pong"


@app.task(base=IsolatedTask, bind=True, max_retries=3)
def retry_until(self: Task, retries: int) -> int:
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    done: int = self.request.retries
    return done


@app.task(base=IsolatedTask, autoretry_for=(Trouble,), default_retry_delay=0)
def retried_by_itself(path: str) -> int:
    bodies.append(path, "begun")
    with open(path) as file:
        begun = len(file.readlines())
    if begun < 3:
        raise Trouble("not yet", begun)
    return begun


@app.task(base=IsolatedTask, bind=True)
def recurse(self: Task, depth: int) -> list[int]:
    return [os.getpid(), *(self(depth - 1) if depth else ())]


@app.task(base=IsolatedTask, ignore_result=True)
def make_thing(size: int) -> Thing:
    return Thing(size)


@app.task(base=IsolatedTask, ignore_result=True)
def grow_thing(thing: Thing) -> Thing:
    return thing.grown()


@app.task(base=IsolatedTask)
def look_at_thing(thing: Thing) -> list[object]:
    return [type(thing) is Thing, thing.size, thing == Thing(thing.size)]


@app.task
def look_at_thing_in_the_slot(thing: Thing) -> list[object]:
    return [type(thing) is Thing, thing.size, thing == Thing(thing.size)]


@app.task(base=IsolatedTask, throws=(Trouble,), ignore_result=True)
def be_in_trouble() -> NoReturn:
    raise Trouble("as expected", 3)


class Quiet(IsolatedTask):
    abstract = True
    suffix = "."

    def run(self, word: str, path: str) -> Any:
        return word.lower() + self.suffix

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        bodies.append(args[1], os.getpid())


class Loud(Quiet):
    name = "script.loud"
    suffix = "!"

    def __init__(self) -> None:
        super().__init__()
        self.made = True

    def run(self, word: str, path: str) -> Any:
        return [super().run(word, path).upper(), self.made, os.getpid()]


app.register_task(Loud())


if __name__ == "__main__":
    app.worker_main(sys.argv[1:])
