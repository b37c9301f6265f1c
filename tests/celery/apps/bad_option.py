"""A task whose options are in $TASK_OPTIONS."""

import json
import os

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask, name="bad.task", **json.loads(os.environ["TASK_OPTIONS"]))
def task() -> None:
    pass
