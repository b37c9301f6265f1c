"""A program whose tasks come by value and use models: ``python django_script.py worker``."""

import os
import sys
from typing import Any

import django

os.environ["DJANGO_SETTINGS_MODULE"] = "probed_settings"
django.setup()

import django.apps  # noqa: E402

from documents.models import Document  # noqa: E402 - needs the settings
from harness.app import make_app  # noqa: E402
from isolated_tasks import IsolatedTask  # noqa: E402

app = make_app("django_script")


@app.task(base=IsolatedTask)
def count() -> list[Any]:
    return [django.apps.apps.ready, Document.objects.count(), os.getpid()]


@app.task(base=IsolatedTask, start_method="spawn")
def count_when_spawned() -> list[Any]:
    return [django.apps.apps.ready, Document.objects.count(), os.getpid()]


if __name__ == "__main__":
    app.worker_main(sys.argv[1:])
