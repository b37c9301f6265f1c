"""Tasks that tell what a body in the example's project finds; `autodiscover_tasks` finds them."""

import contextlib
import logging
import os
from typing import Any

import django.apps
import psutil
from celery import shared_task
from celery.contrib.django.task import DjangoTask
from django.conf import settings
from django.db import connection, connections, transaction

from documents.models import Document
from documents.tasks import count_words
from isolated_tasks import IsolatedMixin, IsolatedTask

logger = logging.getLogger("documents.probes")

# What code does that asks the database as it is imported, in worker, forkserver and client.
for alias in settings.DATABASES:
    # Celery keeps a pool in the worker itself, but for prefork.
    if alias != "pooled" and "documents_document" in connections[alias].introspection.table_names():
        Document.objects.using(alias).exists()


class ProjectTask(IsolatedMixin, DjangoTask):
    """The two bases combined, as a project may do."""

    abstract = True


def end_of_connection(alias: str) -> dict[str, Any]:
    """Which connection this process has, told by the server and by the kernel."""
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "select pg_backend_pid(), inet_client_port(), "
            "(select backend_start::text from pg_stat_activity where pid = pg_backend_pid())"
        )
        backend, port, began = cursor.fetchone()
        descriptor = cursor.connection.fileno()
        socket = os.readlink(f"/proc/self/fd/{descriptor}")
    return {"pid": os.getpid(), "at server": [backend, port, began], "socket": socket}


def holders(socket: str) -> list[int]:
    """All processes of this machine that have this socket open."""
    return [pid for pid in psutil.pids() if socket in open_files(pid)]


def open_files(pid: int) -> list[str]:
    found = []
    # Gone, or closed since it was listed, as the listing's own.
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


@shared_task(base=IsolatedTask)
def connect(look: bool = False) -> dict[str, Any]:
    """Tell of the connection that this call has."""
    found = end_of_connection("default")
    return {**found, "holders": holders(found["socket"]) if look else [found["pid"]]}


@shared_task(base=IsolatedTask, batch_size=3, batch_idle_timeout=60.0)
def connect_in_batch(alias: str) -> dict[str, Any]:
    found = end_of_connection(alias)
    return {**found, "holders": holders(found["socket"])}


@shared_task(base=IsolatedTask, batch_size=3, batch_idle_timeout=60.0)
def leave_open(alias: str) -> list[Any]:
    """Leave a transaction open, as a body does that changes autocommit and fails to commit."""
    before = Document.objects.using(alias).filter(title="left").count()
    transaction.set_autocommit(False, using=alias)
    Document.objects.using(alias).create(title="left", text="")
    return [os.getpid(), before]


@shared_task(base=IsolatedTask)
def change(document_id: int) -> str:
    """Use models as any code does."""
    with transaction.atomic():
        document = Document.objects.select_for_update().get(pk=document_id)
        document.title = document.title.upper()
        document.save()
    return str(Document.objects.get(pk=document_id))


@shared_task(base=ProjectTask)
def add(text: str, commit: bool) -> list[Any]:
    """Add a document and have its words counted, once it is committed."""
    sent_before: list[bool] = []
    try:
        with transaction.atomic():
            document = Document.objects.create(title="added", text=text)
            count_words.delay_on_commit(document.pk)
            again.apply_async_on_commit((document.pk,))
            sent_before.append(bool(connection.run_on_commit))
            if not commit:
                raise LookupError(text)
    except LookupError:
        pass
    return [document.pk, sent_before, bool(connection.run_on_commit)]


@shared_task(base=ProjectTask)
def again(document_id: int) -> int:
    return int(count_words(document_id))


def say(who: str) -> str:
    logger.debug("%s: not to be seen", who)
    logger.info("%s: to be seen", who)
    return repr([settings.CELERY_TASK_DEFAULT_QUEUE, settings.USE_TZ, str(settings.BASE_DIR)])


@shared_task(base=IsolatedTask)
def say_isolated() -> str:
    return say("a body")


@shared_task
def say_plain() -> str:
    return say("a body")


@shared_task(base=IsolatedTask, start_method="spawn")
def count_when_spawned() -> list[Any]:
    return [django.apps.apps.ready, Document.objects.count(), os.getpid()]


@shared_task
def count_plainly() -> int:
    return int(Document.objects.count())
