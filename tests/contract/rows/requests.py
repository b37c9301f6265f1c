"""What a body finds in and around `self`, and what it does with it."""

import importlib.util
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, NoReturn
from uuid import UUID

from celery import Celery, Task, _state, current_task, signals
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.canvas import StampingVisitor, group, signature
from celery.result import allow_join_result, result_from_tuple
from kombu.utils.imports import symbol_by_name

from contract import observation, table
from contract.recorder import Hooks, note
from contract.table import BUT_SPAWNED, Definition, Differs, Row, Seen, task

PAST = timedelta(hours=-1)


def now() -> datetime:
    return datetime.now(timezone.utc)


def fields(request: Context) -> list[str]:
    """Every field of a request, in an order of its own."""
    return [f"{name}: {value!r}" for name, value in sorted(vars(request).items())]


def noted(*beginnings: str) -> Callable[[Seen], bool]:
    """Whether something noted begins with each of these."""

    def check(seen: Seen) -> bool:
        notes = [note.strip("\"'").replace("\\'", "'") for note in observation.all_notes(seen)]
        return all(any(note.startswith(one) for note in notes) for one in beginnings)

    return check


def not_stored(seen: Seen) -> bool:
    """Whether there is no result; Celery 5.5 stores the start of a call that ignores its result."""
    meta = observation.first_task(seen)["meta"]
    return meta is None or meta["status"] == "STARTED"


# ── the request ─────────────────────────────────────────────────────────────────────────────────


@task(bind=True)
def whole(self: Task, *_: Any, **__: Any) -> None:
    note(*fields(self.request))


@task(bind=True)
def defaults(self: Task) -> None:
    """What a request has that nobody has set: defaults of its class."""
    request = self.request
    note(request.taskset, request.utc, request.logfile, request.loglevel, request.get("nobody", 5))
    note(request.children, request.as_execution_options()["task_id"] == request.id)


@task(bind=True)
def lineage(self: Task, key: str) -> None:
    request = self.request
    note(f"{key}: {request.parent_id} of {request.root_id}, headers {request.headers}")
    note(f"{key}: stamps {request.stamps}, {request.stamped_headers}")


@task(bind=True)
def family(self: Task) -> int:
    """Launch tasks in every way that there is."""
    child = lineage.on(self.app)
    child.delay("delay")
    child.apply_async(("apply_async",), countdown=0)
    child.s("signature").delay()
    child.si("signature.apply_async").apply_async()
    self.app.send_task(child.name, ("send_task",))
    self.app.signature(child.name, ("app.signature",)).delay()
    child.apply_async(("other queue",), queue=f"{self.app.conf.task_default_queue}-other")
    child.apply_async(("with headers",), headers={"of": "the child"}, priority=2)
    child.apply_async(("with another parent",), parent_id="parent", root_id=self.request.id)
    return len(self.request.children)


class Visitor(StampingVisitor):  # type: ignore[misc]
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"by": ["a visitor"], "stamped_headers": ["by"]}


class Prepares(Hooks):
    """Puts something on the request, before the body."""

    def before_start(self: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.request.prepared = {"for": "the body"}
        self.request.numbers = (n for n in (1, 2))  # cannot be pickled
        super().before_start(task_id, args, kwargs)


@task(bind=True, mixins=(Prepares,))
def prepared(self: Task) -> Any:
    return self.request.prepared


class Reads(Hooks):
    """Notes what the body has put on the request, after it."""

    def on_success(self: Any, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(f"on_success: {self.request.foo}")
        super().on_success(retval, task_id, args, kwargs)

    def on_failure(self: Any, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(f"on_failure: {self.request.foo}")
        super().on_failure(exc, task_id, args, kwargs, einfo)

    def after_return(
        self: Any, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        note(f"after_return: {self.request.foo}, {self.request.get('update')}")
        super().after_return(status, retval, task_id, args, kwargs, einfo)


@task(bind=True, mixins=(Reads,))
def leave_on_request(self: Task, *, and_fail: bool) -> None:
    self.request.foo = {"left": [1]}
    self.request.update(update="too")
    if and_fail:
        raise LookupError("after setting it")


@task(bind=True)
def change_shadow(self: Task) -> str:
    self.request.shadow = "requests.another_name"
    return "changed"


# ── the current task ────────────────────────────────────────────────────────────────────────────


def who_is_it() -> str:
    """A helper that knows nothing of the task."""
    one = _state.get_current_task()
    return f"{one.name} {one.request.id}"


@task()
def current(app_name: str) -> None:
    one = current_task
    app = one.app
    note(one.name, one.request.id, one.request.kwargs, one.request.args)
    note(app.current_task.name, app.current_worker_task.name, who_is_it())
    note(app.current_worker_task.request is one.request, app.current_task is one)
    note(_state.get_current_worker_task().name, one._get_current_object() is app.tasks[one.name])
    note(app.current_worker_task.request.called_directly, type(one.app.loader).__name__)


@task(bind=True)
def current_app_of(self: Task) -> None:
    note(_state.get_current_app() is self.app, self.app.finalized, self.app.set_as_current)
    note(_state.current_app.main, _state._task_join_will_block in (True, False))


# ── calling tasks ───────────────────────────────────────────────────────────────────────────────


@task(bind=True)
def recurse(self: Task, depth: int) -> list[Any]:
    request = self.request
    note(f"{depth}: {request.id} {request.called_directly} {request.args} {request.retries}")
    lineage.on(self.app).delay(f"at {depth}")
    seen: list[Any] = self(depth - 1) if depth else []
    pids = {os.getpid()} | set(seen[:1])
    return [os.getpid(), len(pids) == 1 and all(seen[1:]), self.request.id == request.id]


@task(bind=True)
def recursive(self: Task) -> list[Any]:
    result: list[Any] = recurse.on(self.app)(2)
    return result[1:]


@task(bind=True)
def factorial(self: Task, x: int) -> int:
    note(f"{x}: {self.request.called_directly}, {len(self.request_stack)}, {self.request.args}")
    return x * int(self(x - 1)) if x > 1 else 1


@task(bind=True)
def factorial_by_name(self: Task, x: int) -> int:
    note(f"{x}: {self.request.called_directly}")
    return x * int(self.app.tasks[self.name](x - 1)) if x > 1 else 1


#: Of the body that calls another one.
_caller: int | None = None


def _is_caller() -> bool:
    return os.getpid() == _caller


def _begin_calls() -> None:
    global _caller
    _caller = os.getpid()


@task(bind=True)
def tell(self: Task, x: int) -> list[Any]:
    """What a task that is called sees of itself, as a value: it may have no id."""
    request = self.request
    worker_task = self.app.current_worker_task
    return [
        x,
        request.id is not None,
        request.called_directly,
        request.is_eager,
        request.args,
        self.app.current_task.name,
        worker_task.name if worker_task else None,
        _is_caller(),
    ]


@task()
def fail_with(key: str) -> NoReturn:
    raise LookupError(key)


@task(bind=True)
def call_directly(self: Task) -> None:
    _begin_calls()
    note(tell.on(self.app)(1), self.app.current_task.name)
    try:
        fail_with.on(self.app)("in a direct call")
    except LookupError as exc:
        note(exc)


@task(bind=True)
def apply_in_body(self: Task) -> None:
    _begin_calls()
    result = tell.on(self.app).apply((2,))
    note(result.get(disable_sync_subtasks=False), result.state, type(result).__name__)
    failed = fail_with.on(self.app).apply(("in apply",))
    note(failed.state, failed.result, self.app.current_task.name)
    note(tell.on(self.app).s(3).apply().result)


@task(bind=True)
def apply_itself(self: Task, x: int) -> Any:
    if x:
        result = self.apply((x - 1,))
        return [self.request.is_eager, self.request.called_directly, result.result]
    return [self.request.is_eager, self.request.delivery_info]


@task(bind=True)
def by_registry(self: Task) -> list[str]:
    assert "requests.lineage" in self.app.tasks
    self.app.tasks["requests.lineage"].delay("by registry")
    return sorted(name for name in self.app.tasks if name.startswith("requests.by_"))


@task(bind=True)
def call_signatures(self: Task, sig: Any) -> Any:
    signature(sig, app=self.app).delay()
    return signature(sig, app=self.app)()


@task()
def double(x: int) -> int:
    return 2 * x


# `result_extended` stores arguments in JSON.
@task(bind=True, ignore_result=True, track_started=False)
def use_task(self: Task, given: Any) -> None:
    note(given is double.on(self.app), given.name, given(4))
    given.delay(5)


@task(bind=True, ignore_result=True, track_started=False)
def use_anything(self: Task, *args: Any, **kwargs: Any) -> None:
    note(*args, kwargs, self.request.args is args, kwargs["function"]().tzinfo)


@task(bind=True)
def use_result(self: Task, parts: Any, *, pickled: Any = None) -> None:
    result = result_from_tuple(parts, self.app)
    note(result.id, result.state in ("PENDING", "STARTED", "SUCCESS"), result.parent)
    if pickled is not None:
        note(type(pickled).__name__, pickled == result)


def send_result(app: Celery) -> Any:
    first = double.on(app).delay(1)
    use_result.on(app).delay(first.as_tuple())
    return first


# ── states and results ──────────────────────────────────────────────────────────────────────────


@task(bind=True)
def update_states(self: Task) -> str:
    self.update_state(state="OWN", meta={"done": 1})
    note(self.AsyncResult(self.request.id).state, self.AsyncResult(self.request.id).info)
    self.update_state(task_id=self.request.id, state="PROGRESS", meta={"done": 2})
    note(self.AsyncResult(self.request.id).info)
    self.update_state(task_id=f"{self.request.id}-other", state="OTHER", meta=[3])
    self.update_state(meta="meta only")
    self.backend.store_result(f"{self.request.id}-stored", {"x": 1}, "SUCCESS")
    self.backend.mark_as_failure(f"{self.request.id}-failed", LookupError("stored"))
    return "done"


def other_states(app: Celery, result: Any) -> list[Any]:
    found = []
    for name in ("other", "stored", "failed"):
        other = app.AsyncResult(f"{result.id}-{name}")
        found.append((other.state, other.result))
        other.forget()
    return found


@task(bind=True)
def send_events(self: Task) -> None:
    self.send_event("task-halfway", done=50, of={"what": "ever"})
    self.send_event("task-nearly", retry=True, retry_policy={"max_retries": 1})


@task(bind=True)
def join(self: Task) -> None:
    """The result is the task's own, so that there is nothing to wait for where Celery would."""
    try:
        self.AsyncResult(self.request.id).get(timeout=0.05)
    except Exception as exc:
        note(exc)
    note(_state.task_join_will_block())


@task(bind=True)
def join_finished(self: Task) -> None:
    for number in range(2):
        self.backend.store_result(f"{self.request.id}-{number}", number + 5, "SUCCESS")
    with allow_join_result():
        note(self.AsyncResult(f"{self.request.id}-0").get(timeout=5))
    result = self.AsyncResult(f"{self.request.id}-1")
    note(result.get(timeout=5, disable_sync_subtasks=False))
    for number in range(2):
        self.backend.forget(f"{self.request.id}-{number}")


RESULTS: dict[str, Any] = {"none": None, "unicode": "Ünïcødé 🐍 \x00 \u2028"}


@task()
def give(kind: str) -> Any:
    return RESULTS[kind]


UNPICKLABLE: dict[str, Callable[[], Any]] = {
    "generator": lambda: (x for x in [1]),
    "match": lambda: re.match("a", "a"),
    "lambda": lambda: lambda: None,
}


@task(ignore_result=True)
def give_unpicklable(kind: str) -> Any:
    return UNPICKLABLE[kind]()


@task(hooks=False)
def give_unpicklable_if_ignored(kind: str) -> Any:
    return UNPICKLABLE[kind]()


@task(bind=True)
def ignore_by_request(self: Task) -> int:
    self.request.ignore_result = True
    return 1


@task(ignore_result=True)
def ignored(x: int) -> int:
    return x


@task(ignore_result=True)
def do_not_store_errors() -> NoReturn:
    raise LookupError("not stored")


@task(bind=True, track_started=False)
def untracked(self: Task) -> str:
    return str(self.AsyncResult(self.request.id).state)


@task(bind=True)
def tracked(self: Task) -> str:
    return str(self.AsyncResult(self.request.id).state)


@task(bind=True, trail=False)
def untrailed(self: Task) -> None:
    lineage.on(self.app).delay("of untrailed")


class OwnBackend(RedisBackend):  # type: ignore[misc]
    # What it stores is no JSON, which `contract.observation` would read.
    task_keyprefix = "contract-own-"


class StoresPickled:
    """Has a backend of its own, which serializes in its own way."""

    _stores: Any = None

    @property
    def backend(self: Any) -> Any:
        if self._stores is None:
            url = self.app.conf.result_backend
            self._stores = OwnBackend(app=self.app, url=url, serializer="pickle")
        return self._stores


@task(mixins=(StoresPickled,))
def store_pickled() -> Any:
    return {"tuple": (1, 2), "set": {3}, "decimal": Decimal("1.5")}


def pickled_result(app: Celery, result: Any) -> Any:
    backend = store_pickled.on(app).backend
    raw = backend.get(backend.get_key_for_task(result.id))
    meta = backend.decode_result(raw)
    backend.forget(result.id)
    backend.result_consumer.stop()
    backend.client.close()
    return [meta["status"], meta["result"]]


@task(resultrepr_maxsize=20)
def give_much() -> list[str]:
    return ["a long text"] * 20


# ── arguments ───────────────────────────────────────────────────────────────────────────────────


@task(bind=True)
def types_of(self: Task, *args: Any, **kwargs: Any) -> None:
    note(*args, kwargs, self.request.argsrepr, self.request.kwargsrepr)
    note(self.request.args, self.request.kwargs, self.request.args is args)


@task(hooks=False)
def measure(text: str, *, more: list[int]) -> list[int]:
    return [len(text), len(more)]


@task()
def only_keywords(*, a: int, b: int = 2) -> list[int]:
    return [a, b]


@task(typing=False)
def untyped(a: int, b: int) -> int:
    return a + b


@task(name="given.name")
def has_another_name(x: int) -> int:
    return x


@task(rate_limit="50/s")
def limited(x: int) -> int:
    return x


@task(bind=True)
def change_arguments(self: Task, values: list[int], **kwargs: Any) -> list[int]:
    values.append(3)
    kwargs["new"] = 1
    note(self.request.args, self.request.kwargs)
    return values


if importlib.util.find_spec("pydantic") is not None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        y: int = 0

    @task(pydantic=True)
    def scale(point: Point, factor: int) -> Point:
        note(type(point).__name__, point.x, point.y)
        return Point(x=point.x * factor, y=point.y * factor)

    @task(bind=True, pydantic=True, pydantic_strict=False)
    def scale_bound(self: Task, point: Point) -> str:
        note(self.request.args)
        return type(point).__name__

    PYDANTIC_ROWS = [
        Row(
            "pydantic models come and go",
            lambda app: scale.on(app).delay({"x": 2}, factor=3),
            expects={
                "state": "SUCCESS",
                "result": {"x": 6, "y": 0},
                "notes": ["'Point'", "0", "2"],
            },
            trap=11,
        ),
        Row(
            "a bound task with a pydantic model",
            lambda app: scale_bound.on(app).delay({"x": 2, "y": 1}),
            expects={"state": "SUCCESS", "result": "Point", "runs": 1},
        ),
        Row(
            "pydantic refuses an argument",
            lambda app: app.send_task("requests.scale", ({"x": "no number"}, 3)),
            expects={"state": "FAILURE", "error": "ValidationError", "runs": 1},
        ),
    ]
else:
    PYDANTIC_ROWS = []


# ── hooks ───────────────────────────────────────────────────────────────────────────────────────


class FailsBefore(Hooks):
    def before_start(self: Any, task_id: str, args: Any, kwargs: Any) -> None:
        super().before_start(task_id, args, kwargs)
        raise LookupError("before_start fails")


class FailsOnSuccess(Hooks):
    def on_success(self: Any, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        super().on_success(retval, task_id, args, kwargs)
        raise LookupError("on_success fails")


class FailsOnFailure(Hooks):
    def on_failure(self: Any, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        super().on_failure(exc, task_id, args, kwargs, einfo)
        raise LookupError("on_failure fails")


class FailsAfter(Hooks):
    def after_return(
        self: Any, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        super().after_return(status, retval, task_id, args, kwargs, einfo)
        raise LookupError("after_return fails")


@task(mixins=(FailsBefore,))
def before_start_fails() -> None:
    note("the body runs")


@task(mixins=(FailsOnSuccess,))
def on_success_fails() -> str:
    return "fine"


@task(mixins=(FailsOnFailure,))
def on_failure_fails() -> NoReturn:
    raise ValueError("the body fails")


@task(mixins=(FailsAfter,))
def after_return_fails() -> str:
    return "fine"


class Launches(Hooks):
    """Launches a task before and one after the body: children of the task, like the body's."""

    def before_start(self: Any, task_id: str, args: Any, kwargs: Any) -> None:
        lineage.on(self.app).delay("of before_start")
        super().before_start(task_id, args, kwargs)

    def on_success(self: Any, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        lineage.on(self.app).delay("of on_success")
        super().on_success(retval, task_id, args, kwargs)


@task(bind=True, mixins=(Launches,))
def launching(self: Task) -> int:
    lineage.on(self.app).delay("of the body")
    return len(self.request.children)


@task(bind=True)
def prepared_by_signal(self: Task) -> str:
    self.request.by_body = "by the body"
    return str(self.request.by_signal)


def _prepare(task: Any = None, args: Any = None, **_: Any) -> None:
    if task.name == "requests.prepared_by_signal":
        task.request.by_signal = "by task_prerun"
        note(f"task_prerun: {args}")


def _look_after(task: Any = None, retval: Any = None, state: Any = None, **_: Any) -> None:
    if task.name == "requests.prepared_by_signal":
        note(f"task_postrun: {task.request.get('by_body')}, {retval}, {state}")


def _look_at_success(sender: Any = None, result: Any = None, **_: Any) -> None:
    if sender.name == "requests.prepared_by_signal":
        note(f"task_success: {sender.request.get('by_body')}, {result}")


signals.task_prerun.connect(_prepare, weak=False)
signals.task_postrun.connect(_look_after, weak=False)
signals.task_success.connect(_look_at_success, weak=False)


# ── bases ───────────────────────────────────────────────────────────────────────────────────────


class WithAttributes:
    """Attributes of a class, and what it makes when it is first used."""

    greeting = "hello"
    table: dict[str, int] = {"a": 1}  # noqa: RUF012 (shared, as in many a base)
    _client: dict[str, Any] | None = None

    @property
    def client(self) -> dict[str, Any]:
        if self._client is None:
            self._client = {"made": "once"}
        return self._client

    @classmethod
    def make(cls, x: int) -> int:
        return x * cls.table["a"]


@task(bind=True, mixins=(WithAttributes,), color="green", numbers=[1, 2])
def with_attributes(self: Task) -> Any:
    note(self.greeting, self.table, self.client, self.client is self.client, self.make(3))
    note(self.color, self.numbers, self.name, self.__name__, self.__module__, self.__doc__)
    note(self.max_retries, self.acks_late, self.serializer, self.typing, self.priority)
    return [self.greeting, self.color]


class CallsSuper:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        note("before", args, kwargs, self.request.called_directly)
        result = super().__call__(*args, **kwargs)  # type: ignore[misc]
        note("after", result)
        return ["around", result]


class CallsRun:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(*args, **kwargs)
        except LookupError as exc:
            return f"caught {exc!r}"


class CallsNothing:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return f"instead of the body: {args}"


@task(bind=True, mixins=(CallsSuper,))
def called_with_super(self: Task, x: int) -> int:
    note(len(self.request_stack), self.request.args)
    lineage.on(self.app).delay("inside of __call__")
    return 2 * x


@task(mixins=(CallsRun,))
def called_without_super(x: int) -> int:
    raise LookupError(x)


@task(mixins=(CallsNothing,))
def never_called(x: int) -> int:
    return x


class AddsHeaders:
    def apply_async(self: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        options["headers"] = {**(options.get("headers") or {}), "added": "by apply_async"}
        kwargs = {**(kwargs or {}), "extra": True}
        return super().apply_async(args, kwargs, **options)  # type: ignore[misc]


@task(bind=True, mixins=(AddsHeaders,))
def own_apply_async(self: Task, depth: int, *, extra: bool = False) -> bool:
    note(self.request.headers, extra)
    if depth:
        self.delay(depth - 1)
    return extra


class Shadows:
    def shadow_name(self: Any, args: Any, kwargs: Any, options: Any) -> str:
        return f"shadow of {args[0]}"


@task(bind=True, mixins=(Shadows,))
def shadowed(self: Task, key: str) -> str:
    return str(self.request.shadow)


class Counts:
    """The body is a method of a class, which is registered by hand."""

    name = "requests.Counts"
    setting = "of the class"

    def __init__(self) -> None:
        self.made = "by __init__"

    def run(self: Any, x: int) -> list[Any]:
        note(self.request.id, self.request.args, self.setting)
        return [x, self.made, self.extra]


class ClassBased(Definition):
    def add_to(self, app: Celery, *, shared: bool) -> None:
        def register(one: Celery) -> None:
            bases = (Counts, Hooks, symbol_by_name(app.task_cls))
            made = type("CountsTask", bases, {"__module__": __name__})()
            made.extra = "set at import"
            one.register_task(made)

        register(app)
        if shared:
            _state.connect_on_app_finalize(register)


counts = ClassBased(Counts.name, Counts.run, {}, ())
table._definitions[counts.name] = counts


def gives(kind: str) -> Row:
    return Row(
        f"a result: {kind}",
        lambda app: give.on(app).delay(kind),
        expects={"state": "SUCCESS", "result": RESULTS[kind], "runs": 1},
    )


def gives_unpicklable(kind: str) -> Row:
    return Row(
        f"a result that is ignored and cannot be pickled: {kind}",
        lambda app: give_unpicklable.on(app).delay(kind),
        expects={"state": None, "runs": 1, "log": "succeeded in"},
        trap=25,
    )


# ── rows ────────────────────────────────────────────────────────────────────────────────────────

ROWS = [
    Row(
        "a plain request",
        lambda app: whole.on(app).delay(1, b="ü"),
        expects={
            "state": "SUCCESS",
            "check": noted(
                "args: [1]",
                "kwargs: {",
                "chain: None",
                "chord: None",
                "group: None",
                "called_directly: False",
                "is_eager: False",
                "id: '<requests.whole(1,)",
                "hostname: '<worker>",
                "origin: '<client>",
                "retries: 0",
                "parent_id: None",
                "root_id: '<requests.whole",
                "ignore_result: False",
                "replaced_task_nesting: 0",
                "timelimit: [None, None]",
                "argsrepr: '(1,)",
            ),
        },
        brokers=("redis", "amqp"),
    ),
    Row(
        "a request with everything",
        lambda app: whole.on(app).apply_async(
            (1,),
            {"b": 2},
            headers={"custom": "header", "deep": {"a": [1]}},
            priority=3,
            shadow="shadowed",
            time_limit=200,
            soft_time_limit=100,
            expires=600,
            reply_to="somebody",
            argsrepr="(my args)",
            kwargsrepr="{my kwargs}",
            ignore_result=False,
            replaced_task_nesting=2,
            queue=f"{app.conf.task_default_queue}-other",
        ),
        expects={
            "state": "SUCCESS",
            "check": noted(
                "custom: 'header",
                "shadow: 'shadowed",
                "timelimit: [200, 100]",
                "expires: '<time>",
                "argsrepr: '(my args)",
                "delivery_info: {",
            ),
        },
        brokers=("redis", "amqp"),
    ),
    Row(
        "fields of a request that nobody has set",
        lambda app: defaults.on(app).delay(),
        expects={"state": "SUCCESS", "runs": 1},
    ),
    Row(
        "a stamped request",
        lambda app: lineage.on(app).s("stamped").stamp(Visitor(), mark="mine").delay(),
        expects={
            "state": "SUCCESS",
            "check": lambda seen: "a visitor" in str(observation.all_notes(seen)),
        },
    ),
    Row(
        "a request of a group",
        lambda app: group(whole.on(app).s(n) for n in range(2)).delay(),
        expects={
            "states": ["SUCCESS", "SUCCESS"],
            "check": noted("group_index: 1", "group: '<id>"),
        },
    ),
    Row(
        "what before_start puts on the request is there for the body",
        lambda app: prepared.on(app).delay(),
        expects={"state": "SUCCESS", "result": {"for": "the body"}},
    ),
    Row(
        "what a body puts on the request is there for the hooks",
        lambda app: leave_on_request.on(app).delay(and_fail=False),
        expects={"state": "SUCCESS", "runs": 1},
    ),
    Row(
        "what a failing body puts on the request is there for the hooks",
        lambda app: leave_on_request.on(app).delay(and_fail=True),
        expects={"state": "FAILURE", "runs": 1},
    ),
    Row(
        "a body changes the name that is logged",
        lambda app: change_shadow.on(app).delay(),
        expects={"state": "SUCCESS", "runs": 1},
    ),
    Row(
        "the current task",
        lambda app: current.on(app).delay(app_name="client"),
        expects={"state": "SUCCESS", "check": noted("requests.current <requests.current")},
    ),
    Row(
        "the current app",
        lambda app: current_app_of.on(app).delay(),
        expects={"state": "SUCCESS", "runs": 1},
        pools=BUT_SPAWNED,
    ),
    Row(
        "tasks that a body launches, in every way",
        lambda app: family.on(app).apply_async(headers={"of": "the parent"}, priority=5),
        expects={"state": "SUCCESS", "result": 9, "children": 9, "tasks": 10},
        trap=7,
        brokers=("redis", "amqp"),
    ),
    Row(
        "tasks that a stamped body launches",
        lambda app: family.on(app).s().stamp(mark="the parent's").delay(),
        expects={"state": "SUCCESS", "result": 9, "children": 9, "tasks": 10},
    ),
    Row(
        "a body calls itself",
        lambda app: factorial.on(app).delay(4),
        expects={"state": "SUCCESS", "result": 24, "runs": 1},
        trap=9,
    ),
    Row(
        "a body calls itself by its name",
        lambda app: factorial_by_name.on(app).delay(4),
        expects={"state": "SUCCESS", "result": 24, "runs": 1},
        trap=9,
    ),
    Row(
        "a body calls a task that calls itself and launches others",
        lambda app: recursive.on(app).delay(),
        expects={"state": "SUCCESS", "result": [True, True], "tasks": 4},
        trap=9,
    ),
    Row(
        "a body calls another task",
        lambda app: call_directly.on(app).delay(),
        expects={
            "state": "SUCCESS",
            "tasks": 1,
            "check": noted(
                "[1, False, True, False, (1,), 'requests.tell', 'requests.call_directly', True]"
            ),
        },
    ),
    Row(
        "a body applies another task",
        lambda app: apply_in_body.on(app).delay(),
        expects={
            "state": "SUCCESS",
            "check": noted("[2, True, False, True, (2,), 'requests.tell', 'requests.tell', True]"),
        },
        trap=9,
    ),
    Row(
        "a body applies itself",
        lambda app: apply_itself.on(app).delay(1),
        expects={"state": "SUCCESS", "runs": 1},
        trap=9,
    ),
    Row(
        "a body finds tasks in the registry",
        lambda app: by_registry.on(app).delay(),
        expects={"state": "SUCCESS", "result": ["requests.by_registry"], "tasks": 2},
    ),
    Row(
        "a signature as an argument",
        lambda app: call_signatures.on(app).delay(double.on(app).s(21)),
        expects={"state": "SUCCESS", "result": 42, "tasks": 2},
    ),
    Row(
        "a task as an argument",
        lambda app: use_task.on(app).apply_async((double.on(app),), serializer="pickle"),
        expects={"state": None, "tasks": 2, "notes": ["'requests.double'", "8", "True"]},
    ),
    Row(
        "a result as an argument",
        send_result,
        expects={"states": ["SUCCESS", "SUCCESS"], "tasks": 2},
    ),
    Row(
        "states of its own, of others, and results that a body stores",
        lambda app: update_states.on(app).delay(),
        look=other_states,
        expects={
            "state": "SUCCESS",
            "looked": r"\('OTHER', \[3\]\), \('SUCCESS', {'x': 1}\), \('FAILURE', LookupError",
        },
    ),
    Row(
        "a body sends events",
        lambda app: send_events.on(app).delay(),
        expects={
            "state": "SUCCESS",
            "events": [
                "task-halfway",
                "task-nearly",
                "task-received",
                "task-sent",
                "task-started",
                "task-succeeded",
            ],
        },
    ),
    Row(
        "a body may not wait for a result",
        lambda app: join.on(app).delay(),
        expects={"state": "SUCCESS", "check": lambda s: "Never call result.get()" in str(s)},
        trap=8,
        pools=("prefork", "prefork-spawn", "threads", "solo"),
    ),
    Row(
        "a body waits for a result in vain where it may",
        lambda app: join.on(app).delay(),
        expects={"state": "SUCCESS", "check": lambda s: "TimeoutError" in str(s)},
        trap=8,
        pools=("gevent", "eventlet"),
    ),
    Row(
        "a body gets a finished result where it says that it may",
        lambda app: join_finished.on(app).delay(),
        expects={"state": "SUCCESS", "notes": ["5", "6"]},
        trap=8,
    ),
    *(gives(kind) for kind in RESULTS),
    *(gives_unpicklable(kind) for kind in UNPICKLABLE),
    Row(
        "a result that is ignored by the call and cannot be pickled",
        lambda app: give_unpicklable_if_ignored.on(app).apply_async(("match",), ignore_result=True),
        expects={"runs": 1, "log": "succeeded in", "check": not_stored},
        trap=25,
    ),
    Row(
        "a call that ignores the result",
        lambda app: double.on(app).apply_async((5,), ignore_result=True),
        expects={"runs": 1, "log": "succeeded in", "check": not_stored},
    ),
    Row(
        "a call that does not ignore the result though the task does",
        lambda app: ignored.on(app).apply_async((5,), ignore_result=False),
        expects={"runs": 1, "log": "succeeded in"},
    ),
    Row(
        "a body has its result ignored",
        lambda app: ignore_by_request.on(app).delay(),
        expects={"runs": 1, "log": "succeeded in"},
    ),
    Row(
        "errors are not stored where results are ignored",
        lambda app: do_not_store_errors.on(app).delay(),
        expects={"state": None, "log": "raised unexpected: LookupError"},
    ),
    Row(
        "a task whose start is tracked",
        lambda app: tracked.on(app).delay(),
        expects={"state": "SUCCESS", "result": "STARTED"},
    ),
    Row(
        "a task whose start is not tracked",
        lambda app: untracked.on(app).delay(),
        expects={"state": "SUCCESS", "result": "PENDING"},
    ),
    Row(
        "a task that leaves no trail",
        lambda app: untrailed.on(app).delay(),
        expects={"state": "SUCCESS", "children": 0, "tasks": 2},
    ),
    Row(
        "a result that is stored pickled",
        lambda app: store_pickled.on(app).delay(),
        look=pickled_result,
        expects={"looked": r"'SUCCESS'.*'tuple': \(1, 2\).*'set': \{3\}.*Decimal\('1.5'\)"},
    ),
    Row(
        "a result that is long in the log",
        lambda app: give_much.on(app).delay(),
        expects={"state": "SUCCESS", "log": r"succeeded in <time>s: \['a long.*\.\.\."},
    ),
    Row(
        "arguments in JSON",
        lambda app: types_of.on(app).delay(
            1, (2, 3), b"\xff", Decimal("1.5"), when=datetime(2020, 1, 1), id=UUID(int=7), ü="é"
        ),
        expects={"state": "SUCCESS", "check": noted("1", "[2, 3]")},
    ),
    Row(
        "pickled arguments",
        lambda app: types_of.on(app).apply_async(
            (1, (2, 3), b"\xff", Decimal("1.5")),
            {"when": datetime(2020, 1, 1), "id": UUID(int=7), "ü": ("é",)},
            serializer="pickle",
        ),
        expects={"state": "SUCCESS", "check": noted("1", "(2, 3)", "Decimal(")},
    ),
    Row(
        "pickled arguments that JSON does not know",
        lambda app: use_anything.on(app).apply_async(
            ({4}, LookupError("x"), frozenset(), 1j, range(3)),
            {"cls": Decimal, "function": now, "nothing": ...},
            serializer="pickle",
        ),
        expects={"state": None, "runs": 1, "check": noted("{4}", "<builtins.LookupError>", "1j")},
    ),
    Row(
        "arguments that a body changes",
        lambda app: change_arguments.on(app).delay([1], old=0),
        expects={"state": "SUCCESS", "result": [1, 3], "check": noted("[[1, 3]]")},
        differs=Differs(
            "what a body changes in an argument stays in its process",
            isolated={"state": "SUCCESS", "result": [1, 3], "check": noted("[[1, 3]]")},
            only=("signals", "meta"),
        ),
    ),
    Row(
        "large arguments",
        lambda app: measure.on(app).delay("x" * 70_000, more=[1] * 1_000),
        expects={"state": "SUCCESS", "result": [70_000, 1_000]},
    ),
    Row(
        "only keyword arguments",
        lambda app: only_keywords.on(app).delay(a=1),
        expects={"state": "SUCCESS", "result": [1, 2]},
    ),
    Row(
        "arguments that do not fit, and nobody checks",
        lambda app: untyped.on(app).delay(1),
        expects={"state": "FAILURE", "error": "TypeError", "message": "missing 1 required"},
    ),
    Row(
        "a task with another name",
        lambda app: app.tasks["given.name"].delay(1),
        expects={"state": "SUCCESS", "result": 1, "log": "given.name"},
    ),
    Row(
        "a rate limit",
        lambda app: [limited.on(app).delay(n).id for n in range(2)],
        expects={"states": ["SUCCESS", "SUCCESS"], "tasks": 2},
    ),
    Row(
        "a task that has expired",
        lambda app: double.on(app).apply_async((6,), expires=now() + PAST),
        expects={"state": "REVOKED", "runs": 0, "signals": ["task_revoked"]},
    ),
    *PYDANTIC_ROWS,
    Row(
        "before_start fails",
        lambda app: before_start_fails.on(app).delay(),
        expects={"state": "FAILURE", "error": "LookupError", "notes": []},
    ),
    Row(
        "on_success fails",
        lambda app: on_success_fails.on(app).delay(),
        expects={"runs": 1, "log": "on_success fails"},
    ),
    Row(
        "on_failure fails",  # stops a plain worker in other pools, or has a task active for ever
        lambda app: on_failure_fails.on(app).delay(),
        expects={"state": "FAILURE", "runs": 1, "check": lambda seen: "on_failure" in str(seen)},
        pools=("prefork", "prefork-spawn"),
    ),
    Row(
        "after_return fails",
        lambda app: after_return_fails.on(app).delay(),
        expects={"runs": 1, "log": "after_return fails"},
    ),
    Row(
        "hooks launch tasks",
        lambda app: launching.on(app).delay(),
        expects={"state": "SUCCESS", "result": 2, "tasks": 4},
        trap=7,
    ),
    Row(
        "receivers of signals use the request",
        lambda app: prepared_by_signal.on(app).delay(),
        expects={
            "state": "SUCCESS",
            "result": "by task_prerun",
            "check": noted("task_postrun: by the body", "task_success: by the body"),
        },
        # In a spawned process these receivers are connected before the recorder's.
        pools=BUT_SPAWNED,
    ),
    Row(
        "a base with attributes and properties",
        lambda app: with_attributes.on(app).delay(),
        expects={"state": "SUCCESS", "result": ["hello", "green"]},
    ),
    Row(
        "a base with __call__, which calls Celery's",
        lambda app: called_with_super.on(app).delay(4),
        expects={"state": "SUCCESS", "result": ["around", 8], "children": 1},
    ),
    Row(
        "a base with __call__, which calls the body",
        lambda app: called_without_super.on(app).delay(5),
        expects={"state": "SUCCESS", "result": "caught LookupError(5)"},
    ),
    Row(
        "a base with __call__, which does not call the body",
        lambda app: never_called.on(app).delay(5),
        expects={"state": "SUCCESS", "result": "instead of the body: (5,)"},
    ),
    Row(
        "a base with apply_async",
        lambda app: own_apply_async.on(app).delay(1),
        expects={"state": "SUCCESS", "result": True, "tasks": 2},
    ),
    Row(
        "a base with shadow_name",
        lambda app: shadowed.on(app).delay("key"),
        expects={"state": "SUCCESS", "result": "shadow of key"},
    ),
    Row(
        "a task that is a class",
        lambda app: counts.on(app).delay(3),
        expects={"state": "SUCCESS", "result": [3, "by __init__", "set at import"]},
    ),
    Row(
        "a task that is applied in the client",
        lambda app: apply_itself.on(app).apply((1,)).get(),
        expects={"sent": r"\[True, False, \[True"},
    ),
]
