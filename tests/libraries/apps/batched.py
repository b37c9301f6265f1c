"""celery-batches: a task that takes many messages at a time."""

from typing import Any

from celery_batches import Batches

from harness.app import make_app
from isolated_tasks import IsolatedMixin

app = make_app(__name__)


class IsolatedBatches(IsolatedMixin, Batches):
    abstract = True


@app.task(base=IsolatedBatches, flush_every=2, flush_interval=1)
def count(requests: list[Any]) -> int:
    return len(requests)
