"""A Django project's app that can be imported once: not by a forkserver, so tasks come by value."""

import os
from pathlib import Path
from typing import Any

import django.apps

from harness.app import make_app
from isolated_tasks import IsolatedTask

Path(os.environ["FOLDER"], "imported").touch(exist_ok=False)

app = make_app(__name__)


@app.task(base=IsolatedTask)
def count() -> list[Any]:
    from documents.models import Document

    return [django.apps.apps.ready, Document.objects.count(), os.getpid()]
