"""Options of tasks and settings of apps, from where users set them to where they take effect."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from harness.processes import PATIENCE, survivors
from harness.worker import Worker

StartWorker = Callable[..., Worker]

APPS = Path(__file__).parent / "apps"

TIMEOUT = 30

MB = 1_000_000

CONF = {
    "isolated_batch_size": 4,
    "isolated_batch_idle_timeout": 60.0,
    "isolated_env": {"TASTE": "sweet"},
    "isolated_preload": ["preload_well", "preload_badly", "preload_with_a_thread"],
    "task_annotations": {"options.by_annotation": {"batch_size": 5}},
}


@pytest.fixture(scope="module")
def running(open_workplace: Callable[[], AbstractContextManager[Any]]) -> Iterator[Worker]:
    with open_workplace() as workplace:
        worker = workplace.start("options", conf=CONF)
        yield worker
        assert worker.stop() == 0


def get(running: Worker, task: str, *args: Any) -> Any:
    return running.call(f"options.{task}", *args).get(timeout=TIMEOUT)


def forkserver(running: Worker) -> int:
    return int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])


# ── batches ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("task", "size"),
    [("by_setting", 4), ("by_decorator", 3), ("by_class", 2), ("by_annotation", 5)],
)
def test_the_batch_size_comes_from_anywhere(running: Worker, task: str, size: int) -> None:
    pids = [get(running, task) for _ in range(2 * size)]

    assert pids == [pids[0]] * size + [pids[size]] * size
    assert pids[0] != pids[size]


def test_a_batch_process_that_has_been_idle_too_long_goes(running: Worker) -> None:
    first = get(running, "not_idle_for_long")

    assert survivors([first], timeout=PATIENCE) == set()
    assert get(running, "not_idle_for_long") != first


def test_a_batch_process_that_holds_too_much_goes(running: Worker) -> None:
    pids = [get(running, "hold", size) for size in (1, 1, 200 * MB, 1)]

    assert len(set(pids[:3])) == 1
    assert pids[3] != pids[0]
    assert survivors([pids[0]], timeout=PATIENCE) == set()


# ── the process ─────────────────────────────────────────────────────────────────────────────────


def test_variables_are_set_for_the_body(running: Worker) -> None:
    assert get(running, "red") == {"COLOUR": "red", "TASTE": None}
    assert get(running, "tasteful") == {"COLOUR": None, "TASTE": "sweet"}


def test_a_process_can_be_a_fresh_interpreter(running: Worker) -> None:
    word = f"word-{os.urandom(4).hex()}"
    result = running.call("options.spawned", word)

    seen = result.get(timeout=TIMEOUT)

    assert seen["id"] == result.id
    assert seen["parent"] == forkserver(running)
    assert "isolated_tasks.process.child" in seen["command"]
    assert seen["frozen"] == 0
    assert seen["setting"] == "green"
    assert seen["colour"] == "blue"
    running.wait_for_log(
        rf"WARNING/ForkPoolWorker-1\] options\.spawned\[{result.id}\]: {word}: from a fresh"
    )


def test_a_fresh_interpreter_gives_the_traceback(running: Worker) -> None:
    result = running.call("options.fail_when_spawned")

    with pytest.raises(LookupError, match="in vain"):
        result.get(timeout=TIMEOUT)

    assert '    raise LookupError("in vain")' in result.traceback


def test_a_setting_made_at_run_time_reaches_the_body(running: Worker) -> None:
    assert get(running, "setting_of_the_worker") == "green"


# ── preload ─────────────────────────────────────────────────────────────────────────────────────


def test_a_module_is_imported_before_the_body_by_the_forkserver(running: Worker) -> None:
    seen = get(running, "preloaded")

    assert seen["pid"] == seen["parent"] == forkserver(running)
    assert re.search(
        r"forkserver pid=\d+ loaded app options:app, preload_well, preload_badly, "
        r"preload_with_a_thread in ",
        running.log(),
    )


def test_a_module_that_cannot_be_imported_is_reported_and_left_out(running: Worker) -> None:
    (entry,) = re.findall(
        r"(?ms)^\[[^\]]*ERROR/MainProcess\] forkserver pid=\d+ failed to load preload_badly:\n"
        r"Traceback.*?^LookupError: this module never works$",
        running.log(),
    )

    assert f'File "{APPS}/preload_badly.py", line 3, in <module>' in entry
    assert 'raise LookupError("this module never works")' in entry
    assert not get(running, "preloaded")["bad"]


def test_a_module_that_starts_a_thread_is_named(running: Worker) -> None:
    warnings = re.findall(r"WARNING/MainProcess\] (forkserver pid=\d+: loading .*)", running.log())

    (warning,) = warnings
    assert "loading preload_with_a_thread left 1 thread(s) running (thread-of-a-preload)" in warning


# ── another base ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["in_context", "in_context_by_super"])
def test_another_bases_call_goes_around_the_body_in_the_child(running: Worker, task: str) -> None:
    slot = running.tree()[-1].pid
    result = running.call(f"options.{task}", 1)

    seen = result.get(timeout=TIMEOUT)

    assert seen["context"] == seen["pid"] != slot
    assert seen["id"] == result.id
    assert [child.id for child in result.children] == [seen["launched"]]


# ── what cannot be used ─────────────────────────────────────────────────────────────────────────

TASK = "task 'bad.task': "

#: Options of the task, settings, and what is said about them.
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"batch_size": 0}, {}, TASK + "batch_size=0: must be"),
    ({"batch_size": "many"}, {}, TASK + "batch_size='many': must be"),
    ({"batch_idle_timeout": -1}, {}, TASK + "batch_idle_timeout=-1: must be"),
    ({"batch_memory_limit": "12 parsecs"}, {}, TASK + "batch_memory_limit='12 parsecs': must be"),
    ({"start_method": "fork"}, {}, TASK + "start_method='fork': must be"),
    ({"env": ["A=1"]}, {}, TASK + "env=['A=1']: must"),
    ({"env": {"A": 1}}, {}, TASK + "env={'A': 1}: must"),
    ({}, {"isolated_batch_size": 1.5}, TASK + "batch_size=1.5: must be"),
    ({}, {"task_annotations": {"bad.task": {"batch_size": []}}}, TASK + "batch_size=[]: must be"),
    ({}, {"isolated_preload": 7}, "app.conf: isolated_preload=7: must be"),
    ({}, {"isolated_forkservers": 0}, "app.conf: isolated_forkservers=0: must be"),
    ({}, {"isolated_start_timeout": "1s"}, "app.conf: isolated_start_timeout='1s': must be"),
]


@pytest.mark.parametrize(("options", "conf", "line"), BAD, ids=[line for _, _, line in BAD])
def test_a_worker_refuses_to_start_with_what_cannot_be_used(
    worker: StartWorker, options: dict[str, Any], conf: dict[str, Any], line: str
) -> None:
    running = worker(
        "bad_option", conf=conf, env={"TASK_OPTIONS": json.dumps(options)}, ready=False
    )

    assert running.process.wait(timeout=TIMEOUT) != 0

    running.wait_for_log(re.escape(line))
    # The last word, below Celery's own frames.
    assert running.log().splitlines()[-1].startswith(f"isolated_tasks.errors.OptionError: {line}")
