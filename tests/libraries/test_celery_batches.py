"""celery-batches takes messages in the main process, so it cannot be isolated, and says so."""

from typing import Any

import pytest
from celery import Celery

from isolated_tasks import IsolatedMixin, OptionError

# Not in the `test` extra: it does not admit the newest Celery, which would be held back by it.
celery_batches = pytest.importorskip(
    "celery_batches", reason="celery-batches does not admit every Celery; pip install --no-deps it"
)


def test_a_task_of_both_is_refused_where_it_is_made() -> None:
    class IsolatedBatches(IsolatedMixin, celery_batches.Batches):  # type: ignore[name-defined]
        abstract = True

    with Celery("test", broker="memory://", set_as_current=False) as app:

        @app.task(base=IsolatedBatches, name="count", shared=False)
        def count(requests: list[Any]) -> int:
            return len(requests)

        with pytest.raises(OptionError, match="celery-batches") as caught:
            app.finalize()

    assert "'count'" in str(caught.value)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_with_such_a_task_does_not_start(workplace: Any, pool: str) -> None:
    worker = workplace.start("batched", pool=pool, ready=False)

    assert worker.process.wait(timeout=30) != 0

    worker.wait_for_log(r"OptionError: task 'batched\.count'.*celery-batches")
    assert " ready." not in worker.log()
