"""What is measured around a call, and that a task never notices."""

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from celery.concurrency import prefork, solo, thread

from isolated_tasks import IsolatedTask, OptionError, audit
from isolated_tasks.audit import EVENT, MANY_HOLES, MemoryAuditStep, Meter, Refuser
from isolated_tasks.process import system
from isolated_tasks.settings import memory_audit_of

MIB = 1 << 20


class Sent(list[dict[str, Any]]):
    """The events that were sent, and what happens when one is."""

    failure: Exception | None = None
    tries = 0

    def send(self, type: str, **fields: Any) -> None:
        self.tries += 1
        if self.failure:
            raise self.failure
        assert type == EVENT
        self.append(fields)


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, sent: Sent) -> Iterator[Celery]:
    with Celery("audit", broker="memory://", set_as_current=False) as app:

        @contextmanager
        def dispatcher(hostname: str) -> Iterator[Sent]:
            assert hostname == "w1@h"
            yield sent

        monkeypatch.setattr(app.events, "default_dispatcher", dispatcher)
        yield app


class Memory:
    """What the kernel and the allocators say, as the test has it."""

    def __init__(self) -> None:
        self.rss = self.malloc = 100 * MIB
        self.blocks = self.holes = 0
        self.peak = 0
        self.asked = 0
        self.collected = 0

    def add(self, size: int, *, in_use: bool = True) -> None:
        self.rss += size
        self.malloc += size if in_use else 0

    def malloc_bytes_and_holes(self) -> tuple[int, int]:
        self.asked += 1
        return self.malloc, self.holes


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()

    def collect() -> None:
        memory.collected += 1

    monkeypatch.setattr(system, "rss_bytes", lambda: memory.rss)
    monkeypatch.setattr(system, "peak_and_rss_bytes", lambda: (memory.peak, memory.rss))
    monkeypatch.setattr(system, "malloc_bytes_and_holes", memory.malloc_bytes_and_holes)
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: memory.blocks)
    monkeypatch.setattr(gc, "collect", collect)
    return memory


class Caller:
    """Calls tasks as a worker does, one after the other."""

    def __init__(self, meter: Meter | Refuser) -> None:
        self.meter = meter
        self.number = 0

    def call(self, name: str, body: Callable[[], object] = lambda: None, **options: Any) -> None:
        self.number += 1
        task = SimpleNamespace(name=name, request=SimpleNamespace(is_eager=False), **options)
        self.meter.begin(task_id=str(self.number), task=task, signal=None)
        body()
        self.meter.end(task_id=str(self.number), task=task, signal=None)


@pytest.fixture
def caller(app: Celery, memory: Memory) -> Caller:
    return Caller(Meter(app, "w1@h"))


# ── one call ────────────────────────────────────────────────────────────────────────────────────


def test_a_call_is_told_with_its_peak_above_its_start(
    caller: Caller, memory: Memory, sent: Sent
) -> None:
    def body() -> None:
        memory.peak = memory.rss + 50 * MIB
        memory.add(2 * MIB)

    caller.call("t", body)

    (event,) = sent
    assert event["run_seconds"] >= 0
    assert {**event, "run_seconds": 0} == {
        "uuid": "1",
        "name": "t",
        "number": 1,
        "start_bytes": 100 * MIB,
        "peak_bytes": 50 * MIB,
        "highest_peak_bytes": 50 * MIB,
        "retained_bytes": 2 * MIB,
        "kept_bytes": 0,
        "used_calls": 0,
        "used_bytes": None,
        "idle_bytes": 0,
        "least_idle_bytes": 0,
        "run_seconds": 0,
        "collected_bytes": None,
        "blocks": None,
    }


def test_what_a_call_keeps_is_known_when_the_next_begins(
    caller: Caller, memory: Memory, sent: Sent
) -> None:
    caller.call("t", lambda: memory.add(5 * MIB))
    memory.add(-3 * MIB)  # its result has been sent
    caller.call("t")

    assert (sent[1]["kept_bytes"], sent[1]["used_bytes"], sent[1]["used_calls"]) == (
        2 * MIB,
        2 * MIB,
        1,
    )


def test_each_task_has_its_own(caller: Caller, memory: Memory, sent: Sent) -> None:
    for _ in range(3):
        caller.call("leaks", lambda: memory.add(MIB, in_use=True))
        caller.call("idles", lambda: memory.add(4 * MIB, in_use=False))

    leak, idle = sent[-2:]
    assert (leak["number"], leak["kept_bytes"], leak["used_bytes"]) == (3, 2 * MIB, 2 * MIB)
    assert (idle["number"], idle["kept_bytes"], idle["used_bytes"]) == (3, 8 * MIB, 0)
    # Of the process, whoever did it.
    assert idle["idle_bytes"] == 8 * MIB


def test_blocks_count_for_what_they_weigh(caller: Caller, memory: Memory, sent: Sent) -> None:
    def body() -> None:
        memory.blocks += 1000

    caller.call("t", body)
    caller.call("t")

    assert sent[1]["used_bytes"] == 1000 * audit.BLOCK_BYTES
    assert sent[1]["idle_bytes"] == -1000 * audit.BLOCK_BYTES
    assert sent[1]["least_idle_bytes"] == -1000 * audit.LARGEST_BLOCK_BYTES


def test_the_highest_peak_is_remembered(caller: Caller, memory: Memory, sent: Sent) -> None:
    for above in (10, 30, 20):
        memory.peak = memory.rss + above * MIB
        caller.call("t")

    assert [event["highest_peak_bytes"] // MIB for event in sent] == [10, 30, 30]


def test_the_collector_runs_around_few_calls(caller: Caller, memory: Memory, sent: Sent) -> None:
    for _ in range(1100):
        caller.call("t")

    sampled = [event["number"] for event in sent if event["collected_bytes"] is not None]
    assert sampled == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert memory.collected == 2 * len(sampled)


def test_what_waited_for_the_collector_has_not_been_kept(
    caller: Caller, memory: Memory, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.call("t", lambda: memory.add(5 * MIB))
    monkeypatch.setattr(gc, "collect", lambda: memory.add(-5 * MIB))
    caller.call("t")

    assert sent[1]["kept_bytes"] == 0


# ── calls that are not measured ─────────────────────────────────────────────────────────────────


def test_a_call_in_place_is_part_of_the_call_that_makes_it(
    caller: Caller, memory: Memory, sent: Sent
) -> None:
    def body() -> None:
        inner = SimpleNamespace(name="inner", request=SimpleNamespace(is_eager=True))
        caller.meter.begin(task_id="9", task=inner)
        memory.add(MIB)
        caller.meter.end(task_id="9", task=inner)

    caller.call("outer", body)
    caller.call("outer")

    assert [event["name"] for event in sent] == ["outer", "outer"]
    assert sent[1]["kept_bytes"] == MIB


def test_an_isolated_task_is_not_told_of_and_ends_the_call_before(
    app: Celery, caller: Caller, memory: Memory, sent: Sent
) -> None:
    @app.task(base=IsolatedTask, name="isolated", shared=False)
    def isolated() -> None: ...

    task = app.tasks["isolated"]
    caller.call("t", lambda: memory.add(MIB))
    caller.meter.begin(task_id="i", task=task)
    memory.add(10 * MIB)
    caller.meter.end(task_id="i", task=task)
    caller.call("t")

    assert [event["name"] for event in sent] == ["t", "t"]
    assert sent[1]["kept_bytes"] == MIB


def test_an_end_without_its_beginning_is_not_told(caller: Caller, sent: Sent) -> None:
    task = SimpleNamespace(name="t", request=SimpleNamespace(is_eager=False))
    caller.meter.begin(task_id="a", task=task)
    caller.meter.end(task_id="b", task=task)

    assert sent == []


# ── allocators ──────────────────────────────────────────────────────────────────────────────────


def test_a_heap_with_many_holes_is_asked_now_and_then(
    caller: Caller, memory: Memory, sent: Sent
) -> None:
    memory.holes = 10 * MANY_HOLES

    for _ in range(1000):
        caller.call("t", lambda: memory.add(MIB))

    assert 50 < memory.asked < 500
    event = sent[-1]
    assert 20 < event["used_calls"] < 300
    # Of those calls only that were measured, in full.
    assert event["used_bytes"] == event["used_calls"] * MIB


def test_tasks_in_turns_are_all_measured_in_a_heap_with_many_holes(
    caller: Caller, memory: Memory, sent: Sent
) -> None:
    memory.holes = 2 * MANY_HOLES

    for number in range(2000):
        caller.call(f"t{number % 4}")

    last = {event["name"]: event["used_calls"] for event in sent}
    assert all(calls > 20 for calls in last.values())


def test_without_glibc_there_is_rss_alone(
    caller: Caller, memory: Memory, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "malloc_bytes_and_holes", lambda: None)

    caller.call("t", lambda: memory.add(MIB))
    caller.call("t")

    assert (sent[1]["kept_bytes"], sent[1]["used_bytes"], sent[1]["idle_bytes"]) == (
        MIB,
        None,
        None,
    )


# ── events that cannot be sent ──────────────────────────────────────────────────────────────────


def test_a_broker_that_is_gone_hurts_no_task_and_is_left_alone(
    caller: Caller, sent: Sent, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sent.failure = ConnectionRefusedError("gone")

    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            caller.call("t")

    assert sent.tries == 1
    assert len(caplog.records) == 1
    assert "gone" in caplog.text

    sent.failure = None
    clock[0] += audit.SILENCE_SECONDS
    caller.call("t")

    assert [event["number"] for event in sent] == [6]


def test_who_cannot_measure_says_so_once_a_second(
    app: Celery, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    caller = Caller(Refuser(app, "w1@h", "because"))

    for name in ("a", "a", "b"):
        caller.call(name)
    clock[0] += audit.REMINDER_SECONDS
    caller.call("a")

    assert [event["name"] for event in sent] == ["a", "b", "a"]
    assert {event["unmeasurable"] for event in sent} == {"because"}


# ── the bootstep ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def receivers() -> Iterator[Callable[[], list[int]]]:
    """How many receivers more than before there are of the two signals."""
    both = (signals.task_prerun, signals.task_postrun)
    before = [len(signal.receivers) for signal in both]
    yield lambda: [
        len(signal.receivers) - number for signal, number in zip(both, before, strict=True)
    ]
    MemoryAuditStep(None).stop(None)


def parent(app: Celery, pool: type) -> Any:
    return SimpleNamespace(app=app, hostname="w1@h", pool_cls=pool, steps=[])


@pytest.mark.parametrize(
    ("setting", "option", "included"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, True)],
)
def test_the_option_or_the_setting_asks_for_it(
    app: Celery, setting: bool | None, option: bool, included: bool
) -> None:
    app.conf.isolated_memory_audit = setting
    worker = parent(app, solo.TaskPool)

    assert MemoryAuditStep(worker, memory_audit=option).include_if(worker) is included


@pytest.mark.parametrize("value", ["yes", 1, "maybe"])
def test_a_setting_that_is_no_bool_is_refused(app: Celery, value: object) -> None:
    app.conf.isolated_memory_audit = value

    with pytest.raises(OptionError, match="isolated_memory_audit") as caught:
        memory_audit_of(app)

    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("pool", [prefork.TaskPool, solo.TaskPool])
def test_it_listens_once_and_stops(
    app: Celery, receivers: Callable[[], list[int]], pool: type
) -> None:
    worker = parent(app, pool)
    steps = [MemoryAuditStep(worker, memory_audit=True) for _ in range(2)]
    for step in steps:
        step.create(worker)

    assert receivers() == [1, 1]
    assert app.conf.isolated_memory_audit is True
    steps[0].stop(worker)
    assert receivers() == [0, 0]


@pytest.mark.parametrize(
    ("pool", "can_reset", "why"),
    [
        (thread.TaskPool, True, "the thread pool runs several tasks in one process"),
        (solo.TaskPool, False, "/proc/self/clear_refs"),
    ],
)
def test_what_cannot_be_measured_is_logged(
    app: Celery,
    receivers: Callable[[], list[int]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    pool: type,
    can_reset: bool,
    why: str,
) -> None:
    monkeypatch.setattr(system, "reset_peak_rss", lambda: can_reset)
    worker = parent(app, pool)

    with caplog.at_level(logging.WARNING):
        MemoryAuditStep(worker, memory_audit=True).create(worker)

    assert why in caplog.text


def test_an_app_with_an_isolated_task_needs_no_installing(app: Celery) -> None:
    assert "isolated_tasks.audit:MemoryAuditStep" not in app.steps["worker"]

    @app.task(base=IsolatedTask, name="isolated", shared=False)
    def isolated() -> None: ...

    assert app.tasks["isolated"]
    assert "isolated_tasks.audit:MemoryAuditStep" in app.steps["worker"]


# ── what the kernel and glibc say ───────────────────────────────────────────────────────────────


def test_a_peak_begins_anew_and_is_found() -> None:
    assert system.reset_peak_rss()
    before = system.rss_bytes()

    held = b"x" * (64 * MIB)
    del held

    peak, rss = system.peak_and_rss_bytes()
    assert peak - before == pytest.approx(64 * MIB, rel=0.05)
    assert rss < before + 32 * MIB
    assert system.reset_peak_rss()
    assert system.peak_and_rss_bytes()[0] < before + 32 * MIB


def test_malloc_tells_what_it_has_handed_out() -> None:
    def used() -> int:
        told = system.malloc_bytes_and_holes()
        assert told is not None
        assert told[1] >= 0
        return told[0]

    before = used()
    small, large = [bytes(1000) for _ in range(10_000)], bytes(64 * MIB)
    held = used()
    del small, large

    assert held - before == pytest.approx(64 * MIB + 10_000_000, rel=0.05)
    assert used() - before < MIB
