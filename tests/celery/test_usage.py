"""What a call used is known, is right, and is found wherever one may look for it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.events.state import State

from harness.events import Events
from harness.worker import Worker
from isolated_tasks import ExitReason

StartWorker = Callable[..., Worker]

MIB = 1 << 20
TIMEOUT = 60.0
EVERY_POOL = ("prefork", "prefork-spawn", "threads", "gevent", "eventlet", "solo")


class Notes:
    """What the app has noted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self, where: str | None = None) -> list[dict[str, Any]]:
        """All, or those of one place, in order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        notes: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [one for one in notes if where in (None, one["where"])]

    def usages(self) -> list[dict[str, Any]]:
        """What the signal told of, in order."""
        return [one["usage"] for one in self.all("isolated_call_finished")]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def start(worker: StartWorker, notes: Notes) -> StartWorker:
    def start(pool: str = "prefork", **options: Any) -> Worker:
        return worker("used", pool=pool, env={"TEST_NOTES": str(notes.path)}, **options)

    return start


def above_start(usage: dict[str, Any], peak: str = "peak_bytes") -> float:
    """In MiB."""
    return float(usage[peak] - usage["baseline_bytes"]) / MIB


# ── is right ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_peak_is_what_the_body_has_touched(start: StartWorker, notes: Notes, pool: str) -> None:
    running = start(pool)
    sizes = [50, 1500, 500, 50]
    pids = [running.call("used.touch", size).get(timeout=TIMEOUT) for size in sizes]
    running.stop()

    usages = notes.usages()
    assert [above_start(usage) for usage in usages] == [pytest.approx(s, rel=0.05) for s in sizes]
    assert [usage["pid"] for usage in usages] == pids
    for usage in usages:
        assert usage["tree_peak_bytes"] >= usage["peak_bytes"]
        assert usage["exit_reason"] == "returned"
        assert usage["position"] == 1
        assert usage["start_method"] == "forkserver"
        assert 0 < usage["system_seconds"] < usage["user_seconds"] + TIMEOUT
        assert 0 < usage["wall_seconds"] < TIMEOUT
        assert 0 < usage["start_seconds"] < TIMEOUT
        assert 0 < usage["argument_bytes"] < 10_000
        assert 0 < usage["result_bytes"] < 10_000


def test_each_call_of_a_batch_has_a_peak_of_its_own(start: StartWorker, notes: Notes) -> None:
    running = start()
    sizes = [500, 50, 500, 50]
    pids = {running.call("used.touch_in_batch", s).get(timeout=TIMEOUT) for s in sizes}
    running.stop()

    usages = notes.usages()
    assert len(pids) == 1
    assert [above_start(usage) for usage in usages] == [pytest.approx(s, rel=0.05) for s in sizes]
    assert [usage["position"] for usage in usages] == [1, 2, 3, 4]


def test_a_fresh_interpreter_does_not_begin_at_the_mark_of_its_forkserver(
    start: StartWorker, notes: Notes
) -> None:
    running = start()
    running.call("used.touch_in_fresh_interpreter", 50).get(timeout=TIMEOUT)
    running.stop()

    (usage,) = notes.usages()
    assert above_start(usage) == pytest.approx(50, rel=0.05)
    assert usage["start_method"] == "spawn"


@pytest.mark.parametrize("size", [50, 500, 1500])
def test_what_a_descendant_held_counts_for_the_tree(
    start: StartWorker, notes: Notes, size: int
) -> None:
    running = start()
    running.call("used.have_touched", size).get(timeout=TIMEOUT)
    running.stop()

    (usage,) = notes.usages()
    # With the interpreter that held it.
    assert size <= above_start(usage, "tree_peak_bytes") < 1.05 * size + 15
    assert above_start(usage) < 10


def test_sizes_are_those_of_what_travels(start: StartWorker, notes: Notes) -> None:
    running = start()
    running.call("used.return_long", 3 * MIB).get(timeout=TIMEOUT)
    running.stop()

    (usage,) = notes.usages()
    assert 3 * MIB <= usage["result_bytes"] < 3.1 * MIB


# ── how it ended ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_each_end_has_its_reason(start: StartWorker, notes: Notes, pool: str) -> None:
    running = start(pool)
    calls = {
        "used.touch": ExitReason.RETURNED,
        "used.fail": ExitReason.RAISED,
        "used.leave": ExitReason.LOST,
        "used.exceed": ExitReason.MEMORY_LIMIT,
        "used.spin": ExitReason.TIME_LIMIT,
    }
    for name in calls:
        arguments = (1,) if name == "used.touch" else ()
        options = {"time_limit": 0.5} if name == "used.spin" else {}
        running.app.send_task(name, arguments, **options).get(timeout=TIMEOUT, propagate=False)
    running.stop()

    told = {one["task"]: one["usage"] for one in notes.all("isolated_call_finished")}
    assert {name: usage["exit_reason"] for name, usage in told.items()} == calls
    # Nobody was there to measure it from inside: this is what the forkserver saw.
    assert told["used.exceed"]["peak_bytes"] > 100 * MIB
    assert told["used.spin"]["user_seconds"] > 0.1
    assert told["used.spin"]["wall_seconds"] == pytest.approx(0.5, abs=0.4)


def test_a_revoked_call_was_stopped(start: StartWorker, notes: Notes) -> None:
    running = start()
    result = running.call("used.spin")
    running.wait_for_log(r"used.spin\[.*\] received")
    running.app.control.revoke(result.id, terminate=True)
    result.get(timeout=TIMEOUT, propagate=False)
    running.stop()

    reasons = [usage["exit_reason"] for usage in notes.usages()]
    # It may have been revoked before it had a process.
    assert reasons in ([], ["stopped"])


# ── where it is found ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", EVERY_POOL)
def test_hooks_and_signals_of_the_slot_see_it_and_ours_comes_in_the_main_process(
    start: StartWorker, notes: Notes, pool: str
) -> None:
    running = start(pool)
    running.call("used.touch", 1).get(timeout=TIMEOUT)
    running.call("used.fail").get(timeout=TIMEOUT, propagate=False)
    main = running.pid
    running.stop()

    for name, places in {
        "used.touch": ("on_success", "task_success", "after_return", "task_postrun"),
        "used.fail": ("on_failure", "task_failure", "after_return", "task_postrun"),
    }.items():
        seen = [one for one in notes.all() if one["task"] == name]
        (told,) = (one for one in seen if one["where"] == "isolated_call_finished")
        assert told["pid"] == main
        by_place = {one["where"]: one["usage"] for one in seen}
        assert by_place.pop("before_start") is None
        assert by_place == dict.fromkeys((*places, "isolated_call_finished"), told["usage"])


def test_a_retried_message_knows_nothing_of_it(start: StartWorker, notes: Notes) -> None:
    running = start()
    assert running.call("used.again").get(timeout=TIMEOUT) == "done"
    running.stop()

    first, second = notes.all("before_start")
    assert (first["usage"], second["usage"]) == (None, None)
    assert first["headers"] == second["headers"]
    assert [usage["exit_reason"] for usage in notes.usages()] == ["raised", "returned"]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_lines_of_the_log_show_it(start: StartWorker, notes: Notes, pool: str) -> None:
    running = start(pool)
    good = running.call("used.touch", 200)
    pid = good.get(timeout=TIMEOUT)
    bad = running.call("used.fail")
    bad.get(timeout=TIMEOUT, propagate=False)
    used = r"peak (\d+) MiB, cpu [\d.e-]+s, pid (\d+)"

    line = running.wait_for_log(rf"\[{good.id}\] succeeded in [\d.e-]+s, {used}: {pid}")
    assert int(line[1]) > 200
    assert int(line[2]) == pid
    running.wait_for_log(rf"\[{bad.id}\] raised unexpected: ValueError\('no'\) \({used}\)")


def test_items_of_a_map_are_told_of_where_they_run(start: StartWorker, notes: Notes) -> None:
    running = start()
    task = running.app.signature("used.touch")
    result = running.app.tasks["celery.map"].apply_async((task, [1, 2, 3]))
    pids = result.get(timeout=TIMEOUT)
    running.stop()

    assert [usage["pid"] for usage in notes.usages()] == pids


# ── events ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def listen() -> Iterator[Callable[[Worker], Events]]:
    listening: list[Events] = []

    def listen(running: Worker) -> Events:
        listening.append(Events(running.app))
        listening[-1].start()
        return listening[-1]

    yield listen
    for events in listening:
        events.stop()


@pytest.mark.parametrize(
    ("task", "last", "state"),
    [
        ("used.touch", "task-isolated", "SUCCESS"),
        ("used.fail", "task-isolated", "FAILURE"),
        ("used.again", "task-retried", "RETRY"),
    ],
)
def test_an_event_tells_it_and_takes_no_state_from_who_follows_them(
    start: StartWorker, listen: Callable[[Worker], Events], task: str, last: str, state: str
) -> None:
    running = start(conf={"worker_send_task_events": True})
    events = listen(running)
    result = running.call(task, *((1,) if task == "used.touch" else ()))

    assert events.wait_for(last, TIMEOUT)

    until = next(n for n, event in enumerate(events.seen) if event["type"] == last) + 1
    found = [event for event in events.seen[:until] if event["type"].startswith("task-")]
    (told,) = (event for event in found if event["type"] == "task-isolated")
    assert told["uuid"] == result.id
    assert told["exit_reason"] == ("returned" if task == "used.touch" else "raised")
    assert told["peak_bytes"] >= told["baseline_bytes"] > 0
    assert told["child_pid"] != told["pid"]
    followed = State()
    for event in found:
        followed.event(event)
    assert followed.tasks[result.id].state == state
    assert followed.tasks[result.id].peak_bytes == told["peak_bytes"]


def test_where_nobody_has_asked_for_events_there_is_none(
    start: StartWorker, notes: Notes, listen: Callable[[Worker], Events]
) -> None:
    running = start()
    events = listen(running)
    running.call("used.touch", 1).get(timeout=TIMEOUT)
    running.stop()
    events.stop()

    assert not [event for event in events.seen if event["type"] == "task-isolated"]
    assert len(notes.usages()) == 1


def test_the_summary_is_for_people() -> None:
    from isolated_tasks.usage import size_text

    sizes = [0, 1023, 1024, 10 * 1024, 1536 * MIB, 200 * MIB, 1 << 50]
    assert [size_text(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "10 KiB",
        "1.5 GiB",
        "200 MiB",
        "1024 TiB",
    ]
    assert not re.search(r"\d{5}", " ".join(map(size_text, sizes)))
