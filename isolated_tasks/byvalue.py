"""Tasks that the forkserver cannot import: of a script, a notebook, a function.

Such a task is sent as its class, taken apart: name, bases and the attributes of its class, among
them the function itself, pickled by value. Other such tasks that the function refers to, itself
included, are sent along, and stand in it by their names, so that no circle needs to be pickled.
"""

from __future__ import annotations

import pickle
import sys
from typing import TYPE_CHECKING, Any

import cloudpickle
from celery import Celery, _state
from celery.app.autoretry import add_autoretry_behaviour
from celery.app.task import Task
from celery.local import Proxy
from celery.utils.threads import LocalStack

from isolated_tasks.process import pickling

if TYPE_CHECKING:
    from io import BytesIO

__all__ = ["Pickler", "define", "definitions", "is_by_value"]

#: Attributes of a bound task class that belong to the process that it was bound in.
_NOT_SENT = frozenset(
    {
        "app",
        "_app",
        "_backend",
        "_exec_options",
        "_default_request",
        "request_stack",
        "__bound__",
        "__dict__",
        "__trace__",
        "__weakref__",
    }
)

#: The definitions that this process has taken in, by task.
_defined: dict[str, bytes] = {}


def is_by_value(task: Task) -> bool:
    """Whether no other process can import the module of this task."""
    module = sys.modules.get(type(task).__module__)
    return type(task).__module__ == "__main__" or getattr(module, "__spec__", None) is None


def _is_made_by_import(task: Task) -> bool:
    """Whether importing its module makes this task; a factory's is in no module."""
    if is_by_value(task):
        return False
    module = sys.modules[type(task).__module__]
    return any(
        isinstance(value, Task) and value.name == task.name for value in vars(module).values()
    )


class Pickler(cloudpickle.Pickler):
    """Pickles tasks that cannot be imported, and the app, by name.

    Args:
        unknown: Names of tasks that the child is known not to have.
    """

    def __init__(
        self,
        file: BytesIO,
        protocol: int = 5,
        buffer_callback: Any = None,
        *,
        unknown: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(file, protocol=protocol, buffer_callback=buffer_callback)
        self._unknown = unknown
        #: The tasks that were met.
        self.met: dict[str, Task] = {}

    def reducer_override(self, obj: Any) -> Any:
        """See ``pickle.Pickler.reducer_override``."""
        if isinstance(obj, Task) and obj.name:
            # What a decorator leaves in a module is a proxy; the registry has the task itself.
            task = obj.app.tasks.get(obj.name, obj)
            if task.name in self._unknown or not _is_made_by_import(task):
                self.met[task.name] = task
                return _task, (task.name,)
        if isinstance(obj, Celery):
            return _state.get_current_app, ()
        if isinstance(obj, LocalStack):
            return LocalStack, ()
        return super().reducer_override(obj)


def _task(name: str) -> Any:
    return Proxy(lambda: _state.get_current_app().tasks[name])


def definitions(tasks: list[Task]) -> list[bytes]:
    """Take these tasks apart, and those that they refer to and that cannot be imported either.

    Raises:
        UnpicklableError: A task refers to something that cannot be pickled.
    """
    from io import BytesIO

    unknown = frozenset(task.name for task in tasks)
    done: dict[str, bytes] = {}
    waiting = {task.name: task for task in tasks}
    while waiting:
        name, task = waiting.popitem()
        parts = _parts(task)
        with BytesIO() as file:
            pickler = Pickler(file, unknown=unknown)
            try:
                pickler.dump(parts)
            except Exception as exc:
                raise pickling.refusal(
                    parts["attributes"], exc, task=name, what="attribute", pickler=Pickler
                ) from exc
            done[name] = file.getvalue()
        waiting.update({n: t for n, t in pickler.met.items() if n not in done})
    return list(done.values())


def _parts(task: Task) -> dict[str, Any]:
    cls = type(task)
    # What bind() has filled in with nothing is left for the child's bind() to fill in.
    unset = {name for name, _ in cls.from_config if vars(cls).get(name) is None}
    attributes = {n: value for n, value in vars(cls).items() if n not in _NOT_SENT | unset}
    parts = {"name": task.name, "class_name": cls.__name__, "bases": cls.__bases__}
    if attributes.get("_decorated"):
        return {**parts, "class": None, "attributes": attributes}
    # Somebody's own class: its methods may refer to it, as super() does, so it stays one piece.
    return {**parts, "class": cls, "attributes": {}}


def define(app: Celery, definition: bytes) -> None:
    """Put a task together again, in the child, and register it."""
    parts = pickle.loads(definition)
    name = parts["name"]
    if _defined.get(name) == definition:
        # An earlier call of this batch brought it.
        return
    cls = parts["class"] or type(parts["class_name"], parts["bases"], parts["attributes"])
    task = cls()
    task.name = name
    app.tasks[name] = task
    task.bind(app)
    add_autoretry_behaviour(task)
    _defined[name] = definition
