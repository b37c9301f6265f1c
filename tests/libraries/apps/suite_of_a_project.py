"""The tests of a project that uses isolated_tasks.testing; test_testing.py runs them."""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import leaky  # type: ignore[import-not-found]  # beside it, where it is run
import pytest
from celery import current_app

from isolated_tasks import (
    ForkserverError,
    IsolationError,
    OptionError,
    RemoteError,
    UnpicklableError,
)
from isolated_tasks.process import system
from isolated_tasks.testing import in_place, measure_growth, start_worker

TIMEOUT = 20
MIB = 1 << 20

Check = Callable[..., Any]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    before = _state()
    yield
    assert _state() == before


def _state() -> list[Any]:
    root = logging.getLogger()
    # Celery has any worker add its own modules to this one.
    changes = {k: v for k, v in leaky.app.conf.changes.items() if k != "include"}
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    handlers = [type(one).__name__ for one in root.handlers]
    return [current_app._get_current_object(), changes, variables, handlers, root.level]


# ── the worker ──────────────────────────────────────────────────────────────────────────────────


def test_before_there_is_a_worker_the_app_has_no_backend() -> None:
    # It must not be remembered.
    assert leaky.pid.apply().get() == os.getpid()
    assert type(leaky.app.backend).__name__ == "DisabledBackend"


def test_a_worker_isolates(isolated_worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("of.the.test").warning("seen")
    before = system.rss_bytes()
    child, size = leaky.takes.delay(200).get(timeout=TIMEOUT)

    assert child != os.getpid()
    assert size == 200 * MIB
    # It was never here.
    assert system.peak_and_rss_bytes()[1] - before < 100 * MIB
    assert leaky.is_clean.delay(2).get(timeout=TIMEOUT) == 2
    assert "seen" in caplog.text


def test_a_worker_is_used_also_where_tasks_are_always_eager() -> None:
    leaky.app.conf.task_always_eager = True
    try:
        assert leaky.pid.delay().get() == os.getpid()
        with start_worker(leaky.app, pool="threads", concurrency=2):
            assert leaky.pid.delay().get(timeout=TIMEOUT) != os.getpid()
        assert leaky.pid.delay().get() == os.getpid()
    finally:
        del leaky.app.conf.changes["task_always_eager"]


@pytest.mark.usefixtures("isolated_in_place")
def test_bodies_run_in_place(isolated_worker: Any) -> None:
    assert leaky.pid.delay().get(timeout=TIMEOUT) == os.getpid()


def test_bodies_run_in_place_for_a_while_and_measuring_does_not_mind_a_worker(
    isolated_worker: Any, assert_no_growth: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    with in_place():
        assert leaky.pid.delay().get(timeout=TIMEOUT) == os.getpid()
    forkserver = leaky.forkserver.delay().get(timeout=TIMEOUT)
    capfd.readouterr()
    assert_no_growth(leaky.forkserver, calls=10, warm_up=0)

    of_its_own = set(map(int, capfd.readouterr().out.split()))
    assert len(of_its_own) == 1
    assert forkserver not in of_its_own
    assert leaky.forkserver.delay().get(timeout=TIMEOUT) == forkserver


def test_a_worker_that_cannot_start_says_so() -> None:
    leaky.app.conf.isolated_preload = ("ends_at_once",)
    leaky.app.conf.isolated_boot_timeout = 2
    try:
        with (
            pytest.raises(ForkserverError, match="'leaky': the embedded worker is not ready"),
            start_worker(leaky.app),
        ):
            pass
    finally:
        del leaky.app.conf.changes["isolated_preload"]
        del leaky.app.conf.changes["isolated_boot_timeout"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("pool", "prefork"), ("concurrency", 0), ("start_timeout", 0), ("shutdown_timeout", "1")],
)
def test_a_worker_refuses_what_it_cannot_use(option: str, value: object) -> None:
    with (
        pytest.raises(OptionError, match=f"start_worker: {option}={value!r}: must be"),
        start_worker(leaky.app, **{option: value}),  # type: ignore[arg-type]
    ):
        pass


# ── growth ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", [leaky.leaks, leaky.maps], ids=lambda task: task.name)
def test_a_leak_fails(assert_no_growth: Check, task: Any) -> None:
    with pytest.raises(AssertionError) as failed:
        assert_no_growth(task, calls=20)

    text = str(failed.value)
    assert f"task '{task.name}': 20 calls, after 5 to warm up, left 20." in text
    assert "1.0 MiB a call; limit='5MB' allows 4.8 MiB" in text
    assert "tracemalloc" in text


def test_what_is_clean_passes_and_is_not_touched_by_what_the_tests_hold(
    assert_no_growth: Check,
) -> None:
    growth = assert_no_growth(leaky.is_clean, args=(2,), limit="500KB")

    assert growth.kept_bytes < 500_000
    assert (growth.task, growth.calls, growth.warm_up) == ("leaky.is_clean", 30, 5)


def test_a_cache_passes_once_it_is_full(assert_no_growth: Check) -> None:
    assert_no_growth(leaky.fills, kwargs={"entries": 5}, calls=10, limit="500KB")
    with pytest.raises(AssertionError, match="give it a larger warm_up"):
        assert_no_growth(leaky.fills, kwargs={"entries": 15}, calls=30)


def test_a_leak_in_a_child_is_not_the_workers_but_its_batchs(assert_no_growth: Check) -> None:
    growth = assert_no_growth(leaky.leaks_in_a_child, calls=15, limit="1MB")
    assert growth.process == "the worker"
    with pytest.raises(AssertionError, match=r"them as one batch, 1\.0 MiB"):
        assert_no_growth(leaky.leaks_in_a_child, calls=15, in_one_child=True)
    with pytest.raises(AssertionError, match=r"in the worker, 1\.0 MiB a call; .* hooks"):
        assert_no_growth(leaky.leaks_in_its_hook, calls=15)


def test_a_task_of_the_test_is_measured_too() -> None:
    held = []

    @leaky.app.task
    def local() -> None:
        held.append(bytearray(MIB))

    growth = measure_growth(local, calls=10, warm_up=1)

    assert 10 * MIB <= growth.kept_bytes < 11 * MIB
    assert held == []


def test_a_call_that_fails_is_an_error() -> None:
    with pytest.raises(RemoteError) as failed:
        measure_growth(leaky.fails)

    assert "task 'leaky.fails': call 1 of 35 raised ValueError: no such luck" in str(failed.value)
    assert 'raise ValueError("no such luck")' in str(failed.value)
    assert failed.value.type_name == "builtins.ValueError"


def test_a_process_that_is_lost_is_an_error() -> None:
    with pytest.raises(IsolationError, match=r"to be measured .*7.* before all calls"):
        measure_growth(leaky.crashes)


def test_it_does_not_take_longer_than_it_may() -> None:
    with pytest.raises(TimeoutError, match=r"timeout=0\.001 s"):
        measure_growth(leaky.is_clean, timeout=0.001)


def test_what_bodies_print_is_captured(capfd: pytest.CaptureFixture[str]) -> None:
    measure_growth(leaky.prints, calls=10, warm_up=0)

    assert capfd.readouterr().out.count("from the body") == 10


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("calls", 9),
        ("calls", True),
        ("warm_up", -1),
        ("limit", "5 pounds"),
        ("limit", 0),
        ("timeout", 0),
    ],
)
def test_what_cannot_be_used_is_refused(
    assert_no_growth: Check, option: str, value: object
) -> None:
    with pytest.raises(OptionError, match=f"task 'leaky.is_clean': {option}={value!r}: must be"):
        assert_no_growth(leaky.is_clean, **{option: value})


def test_what_is_no_task_is_refused(assert_no_growth: Check) -> None:
    with pytest.raises(OptionError, match=r"task=.*must be a task of a Celery app"):
        assert_no_growth(print)


def test_an_argument_that_cannot_be_pickled_is_named(assert_no_growth: Check) -> None:
    with pytest.raises(UnpicklableError, match=r"args\[0\]\['lock'\]|args\[0\]\[\"lock\"\]"):
        assert_no_growth(leaky.is_clean, args=({"lock": threading.Lock()},))
