"""A Django project in forkserver and child: set up before its code, connections of one process.

In a worker Celery's fixup does this on signals that a forkserver and a child never get. Two things
are done otherwise here. A child serves one body at a time and nobody else, so its connections live
as long as ``CONN_MAX_AGE`` says, where the fixup closes them around each task. And the forkserver
keeps none, so that there is none that a child could inherit.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery

__all__ = [
    "add_on_commit",
    "around_body",
    "become_process",
    "close_connections",
    "set_up",
]

#: What Celery's own task class for Django adds, from Celery 5.4 on.
_ON_COMMIT = ("delay_on_commit", "apply_async_on_commit")


def add_on_commit(cls: Any, app: Celery) -> None:
    """Give a task what Django projects have without ``base=``: ``delay_on_commit``."""
    if not _fixups(app):
        return
    module = importlib.import_module("celery.contrib.django.task")
    for name in _ON_COMMIT:
        if not hasattr(cls, name):
            setattr(cls, name, vars(module.DjangoTask)[name])


def set_up(app: Celery) -> None:
    """Have models ready, before anything is loaded that may use them (``django.setup``)."""
    for fixup in _fixups(app):
        fixup.worker_fixup.django_setup()


def close_connections(app: Celery) -> None:
    """Close all, pools too: in the forkserver what an import has opened, in a child at its end."""
    for fixup in _fixups(app):
        worker_fixup = fixup.worker_fixup
        worker_fixup._close_database()
        for connection in _connections():
            # Of Django 5.1 and later. A pool has threads, which a fork would lose.
            if connection.settings_dict.get("OPTIONS", {}).get("pool"):
                connection.close_pool()
        worker_fixup.close_cache()


def become_process(app: Celery) -> None:
    """Drop what is inherited all the same, without a word to its server; once for each child."""
    for fixup in _fixups(app):
        fixup.worker_fixup.on_worker_process_init()


@contextlib.contextmanager
def around_body(app: Celery) -> Iterator[None]:
    """Close connections that are too old or broken, as Django does around a request."""
    _close_old_connections(app)
    try:
        yield
    finally:
        _close_old_connections(app)
        for fixup in _fixups(app):
            fixup.worker_fixup.close_cache()


def _close_old_connections(app: Celery) -> None:
    for fixup in _fixups(app):
        if fixup.worker_fixup.db_reuse_max:
            # A setting of Celery's own, so by its own rule.
            fixup.worker_fixup.close_database()
            continue
        db = importlib.import_module("django.db")
        try:
            db.close_old_connections()
        except db.Error:
            # Of one that cannot even be asked how it is.
            fixup.worker_fixup._close_database()


def _connections() -> list[Any]:
    connections: Any = importlib.import_module("django.db").connections
    try:
        return list(connections.all(initialized_only=True))
    except TypeError:
        # Django before 4.1.
        return list(connections.all())


def _fixups(app: Celery) -> list[Any]:
    # Of the class: to ask the object is to load the app's settings.
    return [fixup for fixup in app._fixups if hasattr(type(fixup), "worker_fixup")]
