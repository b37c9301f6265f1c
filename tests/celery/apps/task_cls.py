"""All tasks of this app are isolated, unless they say otherwise."""

import os

from celery import Celery

from harness.app import Settings

app = Celery(__name__, task_cls="isolated_tasks:IsolatedTask")
app.conf.update(Settings.from_environ().celery_conf())


@app.task
def pid(_: object = None) -> int:
    return os.getpid()


@app.task(isolated=False)
def pid_of_the_slot(_: object = None) -> int:
    return os.getpid()
