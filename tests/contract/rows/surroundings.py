"""What a body finds around itself, what it logs, and what it leaves behind."""

import asyncio
import contextvars
import io
import locale
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import celery
from celery import Task, current_app, current_task, signals
from celery._state import get_current_worker_task
from celery.app.log import TaskFormatter
from celery.utils.log import get_task_logger

from contract.observation import all_notes, first_task
from contract.recorder import note
from contract.table import BUT_SPAWNED, Differs, Row, Seen, task

task_logger = get_task_logger(__name__)
child_logger = task_logger.getChild("child")
logger = logging.getLogger("surroundings.of.its.own")

#: A slot is a process.
PROCESSES = ("prefork", "prefork-spawn")
#: The slots share the worker's process.
ONE_PROCESS = ("threads", "gevent", "eventlet", "solo")

_talks: dict[str, Callable[[Task], Any]] = {}


def talk(function: Callable[[Task], Any]) -> Callable[[Task], Any]:
    _talks[function.__name__] = function
    return function


@task(bind=True)
def log(self: Task, case: str) -> Any:
    return _talks[case](self)


@task(bind=True)
def look(self: Task, case: str) -> None:
    """Note what the body finds."""
    for value in _looks[case](self):
        note(value)


_looks: dict[str, Callable[[Task], list[Any]]] = {}


def find(function: Callable[[Task], list[Any]]) -> Callable[[Task], list[Any]]:
    _looks[function.__name__] = function
    return function


# ── log ─────────────────────────────────────────────────────────────────────────────────────────


@talk
def at_each_level(_: Task) -> None:
    task_logger.debug("too quiet")
    task_logger.info("info: %s", "lazy")
    task_logger.warning("warning: %d %r", 1, "two")
    task_logger.error("error: %(number)d", {"number": 3})
    task_logger.critical("critical")
    task_logger.log(25, "between two levels")


@talk
def by_other_loggers(self: Task) -> None:
    id = self.request.id
    logger.debug("%s too quiet", id)
    logger.info("%s: info", id)
    logger.getChild("child").error("%s: of a child", id)
    logging.getLogger().warning("%s: of the root", id)
    logging.warning("%s: of the module", id)
    child_logger.warning("of a child of the task's logger")
    get_task_logger("elsewhere").error("of another task logger")
    self.app.log.get_default_logger().error("%s: of the app", id)


@talk
def levels_of_loggers(self: Task) -> None:
    quiet, loud = logging.getLogger("surroundings.quiet"), get_task_logger("surroundings.loud")
    quiet.setLevel(logging.ERROR)
    loud.setLevel(logging.DEBUG)
    quiet.warning("%s: too quiet", self.request.id)
    quiet.error("%s: loud enough", self.request.id)
    loud.debug("a level that was lowered")
    note(quiet.isEnabledFor(logging.WARNING), loud.isEnabledFor(logging.DEBUG))


@talk
def with_exceptions(self: Task) -> None:
    try:
        raise LookupError("that is handled")
    except LookupError as exc:
        task_logger.exception("by exception()")
        task_logger.warning("by exc_info", exc_info=True)
        logger.warning("%s: by its own exc_info", self.request.id, exc_info=exc)
    task_logger.warning("without any", exc_info=True)
    task_logger.warning("with its stack", stack_info=True)


@talk
def in_several_lines(self: Task) -> None:
    task_logger.warning("the first line\nthe second\n\nthe last: Grüße, 世界")
    task_logger.warning("a line of %s", "x" * 10_000)
    task_logger.warning("extra", extra={"number": 5})
    task_logger.warning("100%")


@talk
def printed(self: Task) -> None:
    id = self.request.id
    print(f"{id}: printed", end="")
    print(f"{id}: the first line\nthe second")
    print(f"{id}: to stderr", file=sys.stderr)
    sys.stdout.write(f"{id}: written\n")
    sys.stderr.write(f"{id}: written, without an end")
    sys.stdout.flush()
    note(type(sys.stdout).__name__, type(sys.stderr).__name__, sys.stdout.isatty())


@talk
def warned(self: Task) -> None:
    warnings.warn(f"{self.request.id}: a warning", UserWarning, stacklevel=1)
    warnings.warn(f"{self.request.id}: nobody sees this", DeprecationWarning, stacklevel=1)


@talk
def from_a_thread(self: Task) -> None:
    id = self.request.id

    def work(number: int) -> None:
        # The thread has no current task, and no request.
        task_logger.warning("%s: from thread %s", id, number)

    thread = threading.Thread(target=work, args=(1,))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work, 2).result()


@talk
def by_its_own_handler(self: Task) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        TaskFormatter(
            "%(levelname)s %(task_name)s[%(task_id)s] %(name)s %(message)s", use_color=False
        )
    )
    own = get_task_logger("surroundings.handler")
    own.addHandler(handler)
    try:
        own.warning("to both")
    finally:
        own.removeHandler(handler)
    note(stream.getvalue() == f"WARNING {self.name}[{self.request.id}] {own.name} to both\n")


@talk
def how_it_is_set_up(_: Task) -> None:
    for name in ("", "celery", "celery.task", "celery.redirected", __name__):
        one = logging.getLogger(name)
        handlers = [type(handler).__name__ for handler in one.handlers]
        # Celery's get_logger() adds these, to whatever has no handler when it is called.
        handlers = [name for name in handlers if name != "NullHandler"]
        note((name, one.level, one.getEffectiveLevel(), one.propagate, handlers))
    record = task_logger.makeRecord("name", 30, "file", 1, "message", (), None)
    note(record.processName == multiprocessing.current_process().name)


# ── the process ─────────────────────────────────────────────────────────────────────────────────


@find
def python(_: Task) -> list[Any]:
    return [
        sys.getrecursionlimit(),
        sys.getswitchinterval(),
        sys.dont_write_bytecode,
        sys.flags.utf8_mode,
        sys.exc_info(),
        sys.executable,
        sys.stdin.read(),
        __name__,
    ]


@find
def places(_: Task) -> list[Any]:
    return [
        os.getcwd() == os.path.dirname(os.environ["CONTRACT_RECORD"]),
        tempfile.gettempdir() == os.environ["TMPDIR"],
        Path("/proc/self/status").read_text().split("Umask:\t")[1].split("\n")[0],
        os.getuid(),
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getaffinity(0),
        os.environ["CONTRACT_TASK_CLS"].partition(":")[0] in ("celery", "isolated_tasks"),
        os.environ.get("CELERY_LOG_LEVEL"),
        os.environ.get("CELERY_LOG_REDIRECT"),
        os.environ.get("CELERY_LOG_REDIRECT_LEVEL"),
    ]


@find
def language_and_time(self: Task) -> list[Any]:
    return [
        locale.setlocale(locale.LC_ALL),
        locale.getpreferredencoding(),
        sys.getfilesystemencoding(),
        time.tzname,
        time.timezone,
        str(self.app.timezone),
        str(self.app.now().tzinfo),
        self.app.now().utcoffset(),
        self.app.uses_utc_timezone(),
    ]


@find
def numbers(_: Task) -> list[Any]:
    random.seed(5)
    generator = random.Random(6)
    first, second = random.SystemRandom().random(), random.SystemRandom().random()
    return [random.random(), random.randint(1, 1000), generator.random(), first != second]


@find
def whether_it_is_a_daemon(_: Task) -> list[Any]:
    return [multiprocessing.current_process().daemon]


@find
def threads(_: Task) -> list[Any]:
    seen: list[Any] = []
    local = threading.local()
    local.value = 1

    def work() -> None:
        seen.append(hasattr(local, "value"))
        seen.append(bool(current_task))

    thread = threading.Thread(target=work, name="of the body")
    thread.start()
    thread.join()
    with ThreadPoolExecutor(2) as pool:
        seen.extend(pool.map(str, range(3)))
    return seen


@find
def whether_it_has_the_main_thread(_: Task) -> list[Any]:
    return [threading.current_thread() is threading.main_thread()]


@find
def a_signal(_: Task) -> list[Any]:
    seen: list[Any] = []
    try:
        previous = signal.signal(signal.SIGWINCH, lambda number, _: seen.append(number))
    except ValueError as exc:
        return [str(exc).partition(" main thread")[0]]
    try:
        signal.raise_signal(signal.SIGWINCH)
    finally:
        signal.signal(signal.SIGWINCH, previous)
    return [seen, previous == signal.SIG_DFL]


@find
def programs(_: Task) -> list[Any]:
    environment = {**os.environ, "OF_A_BODY": "set"}
    done = subprocess.run(
        ["sh", "-c", "read line; echo $line $OF_A_BODY; echo wrong >&2; exit 3"],
        input="in",
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    return [done.returncode, done.stdout, done.stderr, os.system("exit 2"), os.getpgrp() > 0]


@find
def files(_: Task) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w+") as file:
        file.write("text")
        file.seek(0)
        Path(folder, "made").write_text("made")
        return [file.read(), os.listdir(folder), os.path.dirname(folder) == os.environ["TMPDIR"]]


@find
def coroutines(self: Task) -> list[Any]:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return number * 2

    async def main() -> list[Any]:
        numbers = await asyncio.gather(*map(double, range(3)))
        return [*numbers, current_task.request.id == self.request.id]

    return asyncio.run(main())


# ── the app ─────────────────────────────────────────────────────────────────────────────────────


@find
def settings(self: Task) -> list[Any]:
    names = [
        "accept_content",
        "broker_transport_options",
        "result_expires",
        "result_extended",
        "result_serializer",
        "task_default_queue",
        "task_default_exchange",
        "task_send_sent_event",
        "task_track_started",
        "timezone",
        "worker_concurrency",
        "worker_hijack_root_logger",
        "worker_pool",
        "worker_prefetch_multiplier",
        "worker_redirect_stdouts_level",
        "worker_send_task_events",
    ]
    return [*((name, self.app.conf[name]) for name in names), sorted(self.app.conf.include)]


@find
def the_app(self: Task) -> list[Any]:
    app = self.app
    return [
        app.main,
        app is current_app._get_current_object(),
        app is celery.app.default_app,
        app.tasks[self.name] is self,
        current_task._get_current_object() is self,
        app.current_task is self,
        app.current_worker_task is self,
        get_current_worker_task() is self,
        app.finalized,
        app.configured,
        type(app).__name__,
        type(app.loader).__name__,
        {"celery.chord_unlock", self.name} <= {*app.tasks},
        len(app.tasks),
    ]


@find
def queues(self: Task) -> list[Any]:
    amqp = self.app.amqp
    route = amqp.router.route({}, "a.name")
    return [
        sorted(amqp.queues),
        sorted(amqp.queues.consume_from),
        amqp.default_queue,
        amqp.default_exchange,
        {key: repr(value) for key, value in route.items()},
        type(amqp.router).__name__,
        amqp.argsrepr_maxsize,
    ]


@find
def control(self: Task) -> list[Any]:
    inspect = self.app.control.inspect(["nobody@nowhere"], timeout=0.01)
    self.app.control.broadcast("nothing_knows_this", destination=["nobody@nowhere"])
    return [type(inspect).__name__, inspect.destination, self.app.control.mailbox.namespace]


@find
def the_broker(self: Task) -> list[Any]:
    name = f"own-{self.request.id}"
    with self.app.connection_for_write() as connection:
        with connection.SimpleQueue(name) as queue:
            queue.put({"number": 1}, headers={"own": "header"})
            message = queue.get(block=False)
            message.ack()
            seen = [message.payload, message.headers["own"]]
        connection.default_channel.queue_delete(name)
    with self.app.producer_or_acquire() as producer:
        producer.publish({"number": 2}, routing_key=name, exchange=name, declare=[])
        seen.append(producer.connection.connected)
    with self.app.pool.acquire(block=True) as connection:
        seen.append(connection.connected)
    return seen


@find
def the_backend(self: Task) -> list[Any]:
    backend = self.app.backend
    key = f"own-{self.request.id}"
    backend.client.set(key, "value", ex=60)
    return [
        type(backend).__name__,
        backend is self.backend,
        backend.client.ping(),
        backend.client.get(key),
        backend.client.delete(key),
        backend.get_state(self.request.id),
        self.AsyncResult(self.request.id).state,
        self.app.AsyncResult("never-sent").state,
    ]


# ── what comes from around the body ─────────────────────────────────────────────────────────────

by_prerun = contextvars.ContextVar("by_prerun", default="unset")
by_hook = contextvars.ContextVar("by_hook", default="unset")
by_body = contextvars.ContextVar("by_body", default="unset")


class SetsVariable:
    """Shares a context variable with the body."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        by_hook.set(f"set for {args[0]}")
        super().before_start(task_id, args, kwargs)  # type: ignore[misc]


class Shares(SetsVariable):
    """Shares an attribute with the body, too, and looks at both after it."""

    attribute = "of the class"

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.attribute = "set by before_start"
        super().before_start(task_id, args, kwargs)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(by_hook.get(), by_body.get(), self.attribute)
        super().on_success(retval, task_id, args, kwargs)  # type: ignore[misc]


@task(bind=True, mixins=(SetsVariable,))
def see_context(self: Any, word: str) -> None:
    note(by_prerun.get(), by_hook.get())


@task(bind=True, mixins=(Shares,))
def change_context(self: Any, word: str) -> None:
    note(self.attribute)
    by_hook.set("set by the body")
    by_body.set("set by the body")
    self.attribute = "set by the body"


def _set_context(sender: Any, args: Any, **_: Any) -> None:
    if sender.name in (see_context.name, change_context.name):
        by_prerun.set(f"set for {args[0]}")
        by_body.set("unset")


signals.task_prerun.connect(_set_context, weak=False, dispatch_uid="rows.surroundings")


# ── what a body leaves behind ───────────────────────────────────────────────────────────────────

left_behind: dict[str, str] = {}


class Registry:
    value = "unset"


def _change_global(value: str) -> None:
    left_behind["value"] = value


def _change_class(value: str) -> None:
    Registry.value = value


def _change_environment(value: str) -> None:
    os.environ["LEFT_BEHIND_BY_A_BODY"] = value


def _change_setting(value: str) -> None:
    current_app.conf.left_behind_by_a_body = value


def _change_module(value: str) -> None:
    sys.modules["left_behind_by_a_body"] = type(sys)(value)


#: By what it changes: how, and how the next body looks.
CHANGES: dict[str, tuple[Callable[[str], None], Callable[[], str]]] = {
    "a global variable": (_change_global, lambda: left_behind.get("value", "unset")),
    "an attribute of a class": (_change_class, lambda: Registry.value),
    "the environment": (
        _change_environment,
        lambda: os.environ.get("LEFT_BEHIND_BY_A_BODY", "unset"),
    ),
    "a setting of the app": (
        _change_setting,
        lambda: str(current_app.conf.get("left_behind_by_a_body", "unset")),
    ),
    "the imported modules": (
        _change_module,
        lambda: getattr(sys.modules.get("left_behind_by_a_body"), "__name__", "unset"),
    ),
}


@task(bind=True)
def change(self: Task, what: str) -> str:
    make, see = CHANGES[what]
    found = see()
    if self.request.retries == 0:
        note(found)
        make("changed")
        note(see())
        raise self.retry(countdown=0)
    return found


# ── rows ────────────────────────────────────────────────────────────────────────────────────────


def _logging(name: str, case: Callable[[Task], Any], log_: str, **expects: Any) -> Row:
    return Row(
        name,
        lambda app: log.on(app).delay(case.__name__),
        expects={"state": "SUCCESS", "runs": 1, "log": log_, **expects},
    )


def _finding(
    name: str,
    case: Callable[[Task], list[Any]],
    *notes: str,
    pools: tuple[str, ...] | None = None,
    differs: Differs | None = None,
) -> Row:
    """A row of a body that notes these values, among others."""

    def is_right(seen: Seen) -> bool:
        noted = all_notes(seen)
        return all(one in noted for one in notes)

    return Row(
        name,
        lambda app: look.on(app).delay(case.__name__),
        expects={"state": "SUCCESS", "runs": 1, "check": is_right},
        pools=pools,
        differs=differs,
    )


def _leaving(what: str) -> Row:
    return Row(
        f"what a body changes: {what}",
        lambda app: change.on(app).delay(what),
        expects={
            "state": "SUCCESS",
            "runs": 2,
            # In prefork the next body may run in another slot.
            "check": lambda seen: first_task(seen)["meta"]["result"] in ("changed", "unset"),
        },
        differs=Differs(
            reason="What a body leaves in memory is gone with its process.",
            isolated={"state": "SUCCESS", "runs": 2, "result": "unset"},
        ),
    )


def _leaving_in_one_process(what: str) -> Row:
    return Row(
        f"what a body changes in the worker's process: {what}",
        lambda app: change.on(app).delay(what),
        expects={"state": "SUCCESS", "runs": 2, "result": "changed"},
        pools=ONE_PROCESS,
        differs=Differs(
            reason="What a body leaves in memory is gone with its process.",
            isolated={
                "state": "SUCCESS",
                "runs": 2,
                "result": "unset",
                "notes": ["'changed'", "'unset'"],
            },
        ),
    )


ROWS = [
    _logging(
        "a task's logger at each level",
        at_each_level,
        r"(?s)info: lazy.*warning: 1 'two'.*error: 3.*CRITICAL.*critical.*between two levels",
        check=lambda seen: "too quiet" not in str(seen),
    ),
    _logging(
        "other loggers",
        by_other_loggers,
        r"(?s): info.*of a child.*of the root.*of the module.*of another task logger.*of the app",
        check=lambda seen: "too quiet" not in str(seen),
    ),
    _logging(
        "levels of loggers",
        levels_of_loggers,
        "(?s)loud enough.*a level that was lowered",
        check=lambda seen: "too quiet" not in str(seen),
        notes=["False", "True"],
    ),
    _logging(
        "a log with exceptions",
        with_exceptions,
        r"(?s)by exception\(\)\nTraceback.*by exc_info\nTraceback.*by its own exc_info\nTraceback"
        r".*NoneType: None.*with its stack\nStack",
    ),
    _logging(
        "a log of several lines",
        in_several_lines,
        r"(?s)the first line\nthe second\n\nthe last: Grüße, 世界.*x{10000}.*extra.*100%",
    ),
    _logging(
        "what a body prints",
        printed,
        r"(?s): printed.*the first line\nthe second.*to stderr.*: written.*, without an end",
        notes=["'LoggingProxy'", "'LoggingProxy'", "False"],
    ),
    _logging(
        "a warning",
        warned,
        "UserWarning: .*: a warning",
        check=lambda seen: "nobody sees this" not in str(seen),
    ),
    _logging("a log from a thread", from_a_thread, "(?s)from thread 1.*from thread 2"),
    _logging("a handler of its own", by_its_own_handler, "to both", notes=["True"]),
    Row(
        "how the log is set up",
        lambda app: log.on(app).delay("how_it_is_set_up"),
        expects={"state": "SUCCESS", "check": lambda seen: len(all_notes(seen)) == 6},
    ),
    _finding("Python's settings", python, "''", "(None, None, None)", "'rows.surroundings'"),
    _finding("places and rights", places, "True", "'1'"),
    _finding("language and time", language_and_time, "'UTC'", "datetime.timedelta(0)"),
    _finding("random numbers from a seed", numbers, "0.6229016948897019", "True"),
    _finding(
        "a slot of the prefork pool is a daemon",
        whether_it_is_a_daemon,
        "True",
        pools=PROCESSES,
        differs=Differs(
            reason="A child is no daemon, so its body may use multiprocessing.",
            isolated={"state": "SUCCESS", "notes": ["False"]},
        ),
    ),
    _finding("a thread is no daemon", whether_it_is_a_daemon, "False", pools=ONE_PROCESS),
    _finding("threads of a body", threads, "False", "'0'", "'1'", "'2'"),
    _finding(
        "the main thread",
        whether_it_has_the_main_thread,
        "True",
        pools=(*PROCESSES, "solo"),
    ),
    _finding(
        "a thread of the pool",
        whether_it_has_the_main_thread,
        "False",
        pools=("threads", "gevent", "eventlet"),
        differs=Differs(
            reason="A body has the main thread of its process.",
            isolated={"state": "SUCCESS", "notes": ["True"]},
        ),
    ),
    _finding(
        "a signal in a thread of the pool",
        a_signal,
        "'signal only works in'",
        pools=("threads",),
        differs=Differs(
            reason="A body has the main thread of its process.",
            isolated={"state": "SUCCESS", "notes": ["True", "[28]"]},
        ),
    ),
    _finding("a signal", a_signal, "[28]", "True", pools=(*PROCESSES, "solo")),
    _finding("programs that a body runs", programs, "3", "'in set\\n'", "'wrong\\n'", "512"),
    _finding("temporary files", files, "'text'", "['made']", "True"),
    _finding(
        "a coroutine in a body",
        coroutines,
        "0",
        "2",
        "4",
        "True",
        pools=(*PROCESSES, "threads", "solo"),
    ),
    _finding("settings", settings, "('result_extended', True)"),
    _finding("the app", the_app, "'contract.app'", "True"),
    _finding("queues and routes", queues, "'Router'", pools=BUT_SPAWNED),
    _finding("control", control, "'Inspect'", "['nobody@nowhere']"),
    _finding("a connection of a body's own", the_broker, "{'number': 1}", "'header'", "True"),
    _finding("the backend", the_backend, "b'value'", "'STARTED'", "'PENDING'"),
    Row(
        "context variables that a hook and a receiver have set",
        lambda app: [see_context.on(app).delay(word) for word in ("one", "two")],
        expects={
            "states": ["SUCCESS", "SUCCESS"],
            "check": lambda seen: {"'set for one'", "'set for two'"} <= {*all_notes(seen)},
        },
    ),
    Row(
        "a context variable and an attribute that the body has set",
        lambda app: change_context.on(app).delay("three"),
        expects={
            "state": "SUCCESS",
            "check": lambda seen: (
                "'set by before_start'" in all_notes(seen)
                and all_notes(seen).count("'set by the body'") == 3
            ),
        },
        differs=Differs(
            reason="Hooks and body share the request, and no other memory.",
            isolated={
                "state": "SUCCESS",
                "notes": ["'of the class'", "'set by before_start'", "'set for three'", "'unset'"],
            },
        ),
    ),
    *(_leaving(what) for what in CHANGES),
    *(_leaving_in_one_process(what) for what in CHANGES),
]
