"""Flask's documented recipe (Background Tasks with Celery), with IsolatedTask for Task."""

import os
from typing import Any

from celery import Celery, shared_task
from flask import Flask, current_app, g

from harness.app import Settings
from isolated_tasks import IsolatedTask

#: The processes that have pushed an app context, and those that have taken it down.
pushed: list[int] = []
torn_down: list[int] = []


def celery_init_app(flask: Flask) -> Celery:
    class FlaskTask(IsolatedTask):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask.app_context():
                pushed.append(os.getpid())
                return self.run(*args, **kwargs)

    celery_app = Celery(flask.name, task_cls=FlaskTask)
    celery_app.config_from_object(flask.config["CELERY"])
    celery_app.set_default()
    flask.extensions["celery"] = celery_app
    return celery_app


def create_app() -> Flask:
    flask = Flask(__name__)
    flask.config["GREETING"] = "Hello"
    flask.config["CELERY"] = Settings.from_environ().celery_conf()

    @flask.teardown_appcontext
    def take_down(_: BaseException | None) -> None:
        torn_down.append(os.getpid())

    celery_init_app(flask)
    return flask


flask_app = create_app()
app = flask_app.extensions["celery"]


@shared_task(ignore_result=False)
def greet(name: str) -> dict[str, Any]:
    g.name = name
    return {
        "text": f"{current_app.config['GREETING']}, {g.name}",
        "pid": os.getpid(),
        "pushed": list(pushed),
    }


@shared_task(ignore_result=False, batch_size=2, batch_idle_timeout=60.0)
def look() -> dict[str, Any]:
    seen = {"name": g.get("name"), "pid": os.getpid(), "torn_down": list(torn_down)}
    g.name = "of an earlier call"
    return seen


@shared_task(ignore_result=False)
def fail() -> None:
    raise KeyError(current_app.name)


@shared_task(ignore_result=False, isolated=False)
def in_slot() -> dict[str, Any]:
    """Who has pushed a context here: only this task, which is not isolated, has."""
    return {"app": current_app.name, "pid": os.getpid(), "pushed": list(pushed)}
