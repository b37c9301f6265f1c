"""Forkservers that do not come up as they should, in real workers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker

StartWorker = Callable[..., Worker]

APPS = Path(__file__).parent / "apps"

TIMEOUT = 30


def get(running: Worker, task: str, *args: Any) -> Any:
    return running.call(task, *args).get(timeout=TIMEOUT)


@pytest.mark.fault(41)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_preload_that_crashes_keeps_the_worker_from_starting_and_is_named(
    worker: StartWorker, pool: str
) -> None:
    running = worker(
        "own_call", pool=pool, conf={"isolated_preload": ["preload_that_crashes"]}, ready=False
    )

    assert running.process.wait(timeout=TIMEOUT) != 0

    running.wait_for_log("Segmentation fault")
    running.wait_for_log(rf'File "{re.escape(str(APPS))}/preload_that_crashes\.py", line 5 in ')
    running.wait_for_log("ForkserverError.*died while it loaded the app and isolated_preload")
    assert " ready." not in running.log()


@pytest.mark.fault(41)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_preload_that_hangs_keeps_the_worker_from_starting_and_is_named(
    worker: StartWorker, pool: str
) -> None:
    running = worker(
        "own_call",
        pool=pool,
        conf={"isolated_preload": ["preload_that_hangs"], "isolated_boot_timeout": 1.5},
        ready=False,
    )

    assert running.process.wait(timeout=TIMEOUT) != 0

    running.wait_for_log(rf'File "{re.escape(str(APPS))}/preload_that_hangs\.py", line 5 in ')
    running.wait_for_log(r"ForkserverError.*within 1\.5 s \(isolated_boot_timeout\)")
    assert " ready." not in running.log()


@pytest.mark.fault(41)
def test_a_preload_that_does_not_exist_is_reported_and_left_out(worker: StartWorker) -> None:
    running = worker("own_call", conf={"isolated_preload": "no_such_module, preload_well"})

    entry = running.wait_for_log(
        r"(?s)failed to load no_such_module:\nTraceback .*?\nModuleNotFoundError: [^\n]*"
    )

    assert entry[0].endswith("No module named 'no_such_module'")
    assert get(running, "own_call.is_preloaded")


def test_a_spawned_child_has_no_preloaded_modules(worker: StartWorker) -> None:
    conf = {"isolated_preload": ["preload_well"], "isolated_start_method": "spawn"}

    assert not get(worker("own_call", conf=conf), "own_call.is_preloaded")


@pytest.mark.parametrize("task", ["around", "around_without_super", "around_by_another_base"])
def test_ones_own_call_runs_in_the_child_around_the_body(worker: StartWorker, task: str) -> None:
    running = worker("own_call")

    outside, inside = get(running, f"own_call.{task}")

    assert outside == inside != get(running, "own_call.slot_pid")
