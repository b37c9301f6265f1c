"""Capturing and putting in place, in one process."""

import logging
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any

import pytest

from isolated_tasks import context, signals


class Task:
    """As much of one as the signal's receivers are told."""

    name = "test.task"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """One that can be imported, and where a test puts its variables."""
    module = types.ModuleType("of_the_application")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture(autouse=True)
def own_context() -> Iterator[None]:
    """What a test sets is gone after it."""
    with context._fresh_context():
        yield


def capture() -> context.Carried:
    return context.capture(Task, "id")


def sent(carried: context.Carried) -> context.Carried:
    """As it comes to the child."""
    received: context.Carried = pickle.loads(pickle.dumps(carried))
    return received


def elsewhere(carried: context.Carried, look: Callable[[], Any]) -> Any:
    """What a body finds in a process that has nothing in place."""

    def body() -> Any:
        with context.restored(sent(carried)):
            return look()

    return Context().run(body)


# ── context variables ───────────────────────────────────────────────────────────────────────────


def test_nothing_is_carried_where_nothing_stands() -> None:
    assert Context().run(capture) is context.NOTHING
    with context.restored(None) as hook:
        assert hook == {}


def test_a_variable_of_a_module_and_one_of_a_class_are_carried(module: types.ModuleType) -> None:
    class Holder:
        variable: ContextVar[str] = ContextVar("held")

    Holder.__module__ = module.__name__
    module.Holder, module.variable = Holder, ContextVar("variable")  # type: ignore[attr-defined]
    module.variable.set(["a", 1])
    Holder.variable.set("b")

    found = elsewhere(capture(), lambda: (module.variable.get(), Holder.variable.get()))

    assert found == (["a", 1], "b")


def test_a_variable_that_is_made_later_is_found(module: types.ModuleType) -> None:
    nowhere: ContextVar[int] = ContextVar("nowhere")
    nowhere.set(1)
    assert capture().variables == {}
    module.late = ContextVar("late")  # type: ignore[attr-defined]
    module.late.set(2)

    carried = capture()

    assert list(carried.variables) == ["of_the_application:late"]
    assert elsewhere(carried, module.late.get) == 2


def test_a_variable_that_is_nowhere_is_looked_for_once(module: types.ModuleType) -> None:
    nowhere: ContextVar[int] = ContextVar("nowhere")
    nowhere.set(1)
    capture()

    # So that another look would find it.
    module.variable = nowhere  # type: ignore[attr-defined]

    assert capture().variables == {}


def test_a_value_that_does_not_pickle_stays_behind_alone(
    module: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    module.good, module.bad = ContextVar("good"), ContextVar("bad")  # type: ignore[attr-defined]
    module.good.set(1)
    module.bad.set(threading.Lock())

    with caplog.at_level(logging.DEBUG, "isolated_tasks.context"):
        carried = capture()

    assert list(carried.variables) == ["of_the_application:good"]
    assert [(record.levelname, record.args) for record in caplog.records] == [
        ("DEBUG", ("of_the_application:bad", caplog.records[0].args[1]))  # type: ignore[index]
    ]


def test_a_variable_or_a_value_that_the_child_lacks_costs_only_itself(
    module: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good", "gone", "other", "strange"):
        setattr(module, name, ContextVar(name))
        getattr(module, name).set(name)
    module.strange.set(_Strange())
    carried = capture()
    context._variable.cache_clear()
    del module.gone
    module.other = "no variable here"  # type: ignore[attr-defined]

    with caplog.at_level(logging.DEBUG, "isolated_tasks.context"):
        found = elsewhere(carried, lambda: (module.good.get(), module.strange.get(None)))

    assert found == ("good", None)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    assert len(caplog.records) == 3


class _Strange:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_proxies_and_lazy_modules_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []

    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            touched.append(name)
            return super().__getattribute__(name)

    class Proxy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            touched.append("__class__")
            return ContextVar

    lazy = Lazy("lazy")
    lazy.proxy = Proxy()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    # What some programs leave there.
    monkeypatch.setitem(sys.modules, "of.no.module", object())
    touched.clear()
    nowhere: ContextVar[int] = ContextVar("nowhere")
    nowhere.set(1)

    capture()

    assert touched == []


def test_what_the_body_sets_is_gone_after_it(module: types.ModuleType) -> None:
    module.variable = ContextVar("variable", default="unset")  # type: ignore[attr-defined]
    module.other = ContextVar("other", default="unset")  # type: ignore[attr-defined]
    module.variable.set("of the process")

    def body() -> None:
        module.variable.set("of the body")
        module.other.set("of the body")
        raise KeyError

    with pytest.raises(KeyError), context.restored(capture()):
        body()

    assert module.variable.get() == "of the process"
    assert module.other.get() == "unset"
    assert module.other not in copy_context()


def test_a_program_that_makes_variables_without_end_does_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(context, "_MAX_PLACES", 3)
    monkeypatch.setattr(context, "_places", {})

    def call() -> None:
        nowhere: ContextVar[int] = ContextVar("nowhere")
        nowhere.set(1)
        capture()

    for _ in range(10):
        Context().run(call)

    assert sum(place is None for place in context._places.values()) <= 4


# ── the hook ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def receive() -> Iterator[Callable[[Any], None]]:
    """Connects a receiver for the length of a test."""
    connected = []

    def connect(receiver: Any) -> None:
        signals.before_isolated_call.connect(receiver, weak=False)
        connected.append(receiver)

    yield connect
    for receiver in connected:
        signals.before_isolated_call.disconnect(receiver)


def test_what_receivers_give_comes_to_the_body(receive: Callable[[Any], None]) -> None:
    def give(sender: Any, task_id: str, carried: dict[str, Any], **_: Any) -> None:
        carried["about"] = (sender.name, task_id)
        carried["function"] = lambda: "by value"

    receive(give)

    with context.restored(sent(capture())) as carried:
        assert carried["about"] == ("test.task", "id")
        assert carried["function"]() == "by value"


def test_what_does_not_pickle_is_named_and_the_rest_comes(
    receive: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    receive(lambda carried, **_: carried.update(lock=threading.Lock(), good=1))

    with context.restored(sent(capture())) as carried:
        assert carried == {"good": 1}

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("task test.task[id]: carried['lock'], of type lock, ")


def test_what_does_not_unpickle_is_named_and_the_rest_comes(
    receive: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    receive(lambda carried, **_: carried.update(strange=_Strange(), good=1))

    with context.restored(sent(capture())) as carried:
        assert carried == {"good": 1}

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("carried['strange'] does not come to the body: ")


def test_a_receiver_that_raises_does_not_cost_what_others_give(
    receive: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise KeyError("of a receiver")

    receive(fail)
    receive(lambda carried, **_: carried.update(good=1))

    with context.restored(sent(capture())) as carried:
        assert carried == {"good": 1}

    assert "of a receiver" in caplog.text


# ── libraries ───────────────────────────────────────────────────────────────────────────────────


def test_a_library_in_trouble_is_logged_once_and_costs_only_itself(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # What an incompatible version of it looks like.
    monkeypatch.setitem(sys.modules, "structlog.contextvars", types.ModuleType("structlog"))
    monkeypatch.setattr(context, "_said", set())
    module.variable = ContextVar("variable")  # type: ignore[attr-defined]
    module.variable.set(1)

    first, second = capture(), capture()

    assert first == second != context.NOTHING
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("structlog.contextvars failed: ")


def test_the_arithmetic_of_decimal_is_carried() -> None:
    import decimal

    def calculate() -> str:
        return str(decimal.Decimal(1) / 3)

    def of_four_digits() -> context.Carried:
        decimal.getcontext().prec = 4
        return capture()

    assert elsewhere(Context().run(of_four_digits), calculate) == "0.3333"
    assert len(Context().run(calculate)) > 10


def test_nothing_is_imported_to_carry_context(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in context._LIBRARIES:
        monkeypatch.delitem(sys.modules, library.module, raising=False)

    with context.restored(sent(capture())):
        pass
    context.flush(timeout=1.0)

    assert not {library.module for library in context._LIBRARIES} & set(sys.modules)


# ── the end of the process ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """In place of OpenTelemetry's: a backend that can be slow, and what it got."""
    provider = types.SimpleNamespace(got=[], ready=threading.Event())

    def force_flush(timeout_millis: int) -> None:
        provider.ready.wait()
        provider.got.append(timeout_millis)

    provider.force_flush = force_flush
    trace = types.ModuleType("opentelemetry.trace")
    trace.get_tracer_provider = lambda: provider  # type: ignore[attr-defined]
    for name in list(sys.modules):
        if name.startswith("opentelemetry"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", types.ModuleType("context"))
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)
    return provider


def test_what_libraries_have_buffered_is_sent(provider: types.SimpleNamespace) -> None:
    provider.ready.set()

    context.flush(timeout=5.0)

    assert 4000 < provider.got[0] <= 5000


def test_a_library_that_cannot_send_is_not_waited_for_any_longer(
    provider: types.SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    context.flush(timeout=0.05)

    assert provider.got == []
    provider.ready.set()
    assert "opentelemetry.context could not send all" in caplog.text
    for thread in threading.enumerate():
        if thread.name == "isolated_tasks flush":
            thread.join()
