"""The memory profile of a call, from its option to a file that its profiler reads."""

import importlib
import os
import re
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from harness.worker import Worker
from harness.workplace import Workplace
from isolated_tasks import MemoryLimitExceeded

TIMEOUT = 60

APP = Path(__file__).parent / "apps" / "profiled.py"
SIZE = 20 << 20

#: What `bytearray` takes beyond what is asked for.
BYTEARRAY = 1

needs_memray = pytest.mark.skipif(
    importlib.util.find_spec("memray") is None, reason="memray is not installed: it has no wheel"
)


class Call:
    """One that has ended, with the path of its profile as the log has it."""

    def __init__(self, worker: Worker, name: str, *args: Any, **options: Any) -> None:
        self.result = worker.app.send_task(f"profiled.{name}", args, **options)
        self.value = self.result.get(timeout=TIMEOUT, propagate=False)
        line = worker.wait_for_log(
            rf"Task \S+\[{self.result.id}\] (?:succeeded|raised|retry|ignored).*pid \d+.*"
        )[0]
        found = re.search(r"pid \d+, profile ([^\s:)]+)", line)
        self.path = Path(found[1]) if found else None


class Events:
    """Those of isolated calls, by task id."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._changed = threading.Condition()
        self._seen: dict[str, dict[str, Any]] = {}
        self._connection = app.connection_for_read()
        handlers = {"task-isolated": self._add, "test": self._add}
        self._receiver = app.events.Receiver(self._connection, handlers=handlers)
        self._thread = threading.Thread(target=self._capture)

    def _capture(self) -> None:
        self._receiver.capture(limit=None, timeout=None, wakeup=False)

    def _add(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._seen[event["uuid"]] = event
            self._changed.notify_all()

    def _send(self, uuid: str) -> None:
        with self._app.events.default_dispatcher() as dispatcher:
            dispatcher.send("test", uuid=uuid)

    def of(self, uuid: str, timeout: float = TIMEOUT) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: uuid in self._seen, timeout)
            return self._seen.get(uuid)

    def start(self) -> None:
        self._thread.start()
        # What is published before the subscription stands is lost; nothing says when it does.
        for _ in range(60):
            self._send("begin")
            if self.of("begin", timeout=0.5):
                return
        raise TimeoutError("no event arrives")

    def stop(self) -> None:
        self._receiver.should_stop = True
        self._send("end")
        self._thread.join(timeout=TIMEOUT)
        self._connection.release()


@contextmanager
def events_of(app: Celery) -> Iterator[Events]:
    events = Events(app)
    events.start()
    try:
        yield events
    finally:
        events.stop()


def line_of(text: str) -> int:
    lines = APP.read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.endswith(text)]
    return number


def by_memray(path: Path | None, *, at: str = "# here") -> list[int]:
    """The sizes of what a line of the app had allocated at the peak, as memray tells."""
    import memray

    assert path is not None
    with memray.FileReader(path) as reader:
        records = list(reader.get_high_watermark_allocation_records(merge_threads=True))
        tops = [(record.size, record.stack_trace(max_stacks=1)) for record in records]
    return [
        size
        for size, stack in tops
        if any((file, line) == (str(APP), line_of(at)) for _, file, line in stack)
    ]


def by_tracemalloc(path: Path | None, *, at: str = "# here") -> list[int]:
    """The sizes of what a line of the app had allocated and kept, as tracemalloc tells."""
    assert path is not None
    statistics = tracemalloc.Snapshot.load(str(path)).statistics("lineno")
    return [
        one.size
        for one in statistics
        if (one.traceback[0].filename, one.traceback[0].lineno) == (str(APP), line_of(at))
    ]


READ = {"memray": by_memray, "tracemalloc": by_tracemalloc}

PROFILERS = [pytest.param("memray", marks=needs_memray), "tracemalloc"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "profiles"
    directory.mkdir()
    return directory


@pytest.fixture
def start(workplace: Workplace, directory: Path) -> Callable[..., Worker]:
    """Starts a worker whose profiles go to `directory`."""

    def start(*, conf: dict[str, Any] | None = None, **options: Any) -> Worker:
        conf = {"isolated_profile_directory": str(directory), **(conf or {})}
        return workplace.start("profiled", conf=conf, **options)

    return start


StartWorker = Callable[..., Worker]


# ── what is in it ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("profiler", PROFILERS)
def test_a_profile_shows_what_the_body_took_and_where_and_all_tell_its_path(
    start: StartWorker, directory: Path, profiler: str, pool: str
) -> None:
    worker = start(pool=pool, args=["-E"])

    with events_of(worker.app) as events:
        call = Call(worker, f"by_{profiler}")
        event = events.of(call.result.id)

    assert isinstance(call.value, int)
    (taken,) = READ[profiler](call.path)
    assert SIZE <= taken < SIZE + 1000
    assert call.path is not None
    assert call.path.parent == directory
    assert re.fullmatch(
        rf"profiled\.by_{profiler}-{call.result.id}-\d{{8}}T\d{{6}}\.\d{{6}}Z\.{profiler}",
        call.path.name,
    )
    assert event is not None
    assert event["profile_path"] == str(call.path)


def test_beside_a_snapshot_lies_a_text_with_the_peak_and_the_first_lines(
    start: StartWorker,
) -> None:
    call = Call(start(), "by_tracemalloc")

    text = Path(f"{call.path}.txt").read_text().splitlines()
    peak, held = (int(re.findall(r": (\d+) bytes", line)[0]) for line in text[:2])

    assert SIZE < held <= peak < 1.1 * SIZE
    assert text[2] == ""
    assert text[3].startswith(f"{APP}:{line_of('# here')}: size=20.0 MiB, count=")
    assert text[4] == "    kept.append(bytearray(size))  # here"


@pytest.mark.parametrize(
    "conf",
    [
        pytest.param({"isolated_preload": ["memray"]}, marks=needs_memray, id="preloaded"),
        pytest.param({"isolated_start_method": "spawn"}, marks=needs_memray, id="spawned"),
    ],
)
def test_memray_may_be_preloaded_and_a_child_spawned(
    start: StartWorker, conf: dict[str, Any]
) -> None:
    call = Call(start(conf=conf), "by_memray")

    assert sum(by_memray(call.path)) >= SIZE


def test_a_task_whose_results_are_encoded_has_a_profile_too(start: StartWorker) -> None:
    call = Call(start(), "encoded")

    assert isinstance(call.value, int)
    assert by_tracemalloc(call.path)


@needs_memray
def test_a_body_that_fails_is_profiled(start: StartWorker) -> None:
    call = Call(start(), "fail")

    assert isinstance(call.value, LookupError)
    assert sum(by_memray(call.path)) > SIZE


@pytest.mark.parametrize("profiler", PROFILERS)
def test_a_copy_that_the_body_forks_leaves_the_profile_alone(
    start: StartWorker, directory: Path, profiler: str
) -> None:
    call = Call(start(), "fork", str(directory), headers={"isolated_profile": profiler})

    assert call.value == []
    assert sum(READ[profiler](call.path)) >= SIZE


@pytest.mark.parametrize("profiler", PROFILERS)
def test_each_call_of_a_batch_has_a_profile_of_its_own(start: StartWorker, profiler: str) -> None:
    worker = start()
    sizes = [SIZE, 2 * SIZE, SIZE]

    calls = [Call(worker, f"batch_by_{profiler}", size) for size in sizes]

    assert len({call.value for call in calls}) == 1
    assert len({call.path for call in calls}) == 3
    at = "# in a batch" if profiler == "memray" else "# here"
    for call, size in zip(calls, sizes, strict=True):
        (taken,) = READ[profiler](call.path, at=at)
        assert size <= taken < size + 1000


# ── killed ──────────────────────────────────────────────────────────────────────────────────────


@needs_memray
def test_the_profile_of_a_call_that_was_killed_for_its_memory_is_there(start: StartWorker) -> None:
    worker = start(args=["-E"])

    with events_of(worker.app) as events:
        call = Call(worker, "too_much_for_memray")
        event = events.of(call.result.id)

    assert isinstance(call.value, MemoryLimitExceeded)
    assert event is not None
    assert (event["exit_reason"], event["profile_path"]) == ("memory_limit", str(call.path))
    assert SIZE <= sum(by_memray(call.path)) < SIZE + 1000


def test_of_a_call_that_was_killed_tracemalloc_has_nothing_and_the_log_says_so(
    start: StartWorker, directory: Path
) -> None:
    worker = start(args=["-E"])

    with events_of(worker.app) as events:
        call = Call(worker, "too_much_for_tracemalloc")
        event = events.of(call.result.id)

    assert isinstance(call.value, MemoryLimitExceeded)
    assert call.path is None
    assert event is not None
    assert event["profile_path"] is None
    assert list(directory.iterdir()) == []
    worker.wait_for_log(
        rf"task profiled\.too_much_for_tracemalloc\[{call.result.id}\]: no profile: its process "
        r"was gone \(memory_limit\) before tracemalloc had written one, which it does when"
    )


# ── which calls ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("profiler", PROFILERS)
def test_one_call_is_profiled_for_its_header(start: StartWorker, profiler: str) -> None:
    worker = start()

    before = Call(worker, "plain")
    call = Call(worker, "plain", headers={"isolated_profile": profiler})
    after = Call(worker, "plain")

    assert (before.path, after.path) == (None, None)
    assert sum(READ[profiler](call.path)) >= SIZE


def test_a_header_goes_before_the_option(start: StartWorker) -> None:
    call = Call(start(), "by_memray", headers={"isolated_profile": "tracemalloc"})

    assert by_tracemalloc(call.path)


def test_a_call_that_is_profiled_for_its_header_is_when_it_is_retried(
    start: StartWorker, directory: Path
) -> None:
    worker = start()

    call = Call(worker, "retry_once", headers={"isolated_profile": "tracemalloc"})

    worker.wait_for_log(rf"{call.result.id}\] succeeded")
    assert len(list(directory.glob(f"*{call.result.id}*.tracemalloc"))) == 2


def test_a_header_with_another_word_is_a_warning(start: StartWorker, directory: Path) -> None:
    worker = start()

    calls = [Call(worker, "plain", headers={"isolated_profile": word}) for word in ("nonesuch", 7)]

    assert all(isinstance(call.value, int) for call in calls)
    assert list(directory.iterdir()) == []
    assert re.findall(r"WARNING\S* (.*no profile.*)", worker.log()) == [
        "task profiled.plain: no profile, its calls run without one: header "
        "isolated_profile='nonesuch': must be 'memray' or 'tracemalloc'"
    ]


def test_one_call_in_some_is_profiled(start: StartWorker) -> None:
    worker = start(concurrency=2)
    results = [worker.call("profiled.one_in_two") for _ in range(64)]

    for result in results:
        result.get(timeout=TIMEOUT)
        worker.wait_for_log(rf"{result.id}\] succeeded")

    # All or none would come once in 10^19 runs.
    assert 0 < len(re.findall(r"succeeded in .*, profile ", worker.log())) < 64


# ── where it goes ───────────────────────────────────────────────────────────────────────────────


def test_the_directory_is_private_where_nobody_has_chosen_one(
    worker: StartWorker, workplace: Workplace
) -> None:
    call = Call(worker("profiled"), "by_tracemalloc")

    assert call.path is not None
    assert call.path.parent == workplace.temporary / f"isolated_tasks-profiles-{os.geteuid()}"
    assert stat.S_IMODE(call.path.parent.stat().st_mode) == 0o700
    for path in (*call.path.parent.iterdir(), call.path.parent):
        path.unlink() if path.is_file() else path.rmdir()


@needs_memray
def test_no_name_of_a_task_and_no_id_leads_out_of_the_directory(
    start: StartWorker, directory: Path
) -> None:
    worker = start()
    task_id = f"../../{os.urandom(4).hex()}/.. a\n;b/" + "x" * 300

    result = worker.app.send_task("../../profiled/./.. $(id)\n%s", task_id=task_id)
    result.get(timeout=TIMEOUT)

    (path,) = directory.iterdir()
    worker.wait_for_log(rf"profile {re.escape(str(path))}")
    assert re.fullmatch(r"_[\w.-]+-_[\w.-]+Z\.memray", path.name)
    assert sum(by_memray(path)) >= SIZE


@pytest.mark.parametrize("profiler", PROFILERS)
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/nonesuch/profiles", "profile_directory: .*No such file or directory: '/nonesuch/"),
        (__file__, f"profile_directory: '{re.escape(__file__)}' is no directory"),
        # Where even root can make nothing, but is told that it may: the child finds out.
        ("/proc", "(OSError|FileNotFoundError): .*/proc/profiled"),
    ],
    ids=["missing", "a file", "unwritable"],
)
def test_a_directory_that_cannot_be_used_is_one_warning_and_the_task_succeeds(
    start: StartWorker, profiler: str, where: str, reason: str
) -> None:
    worker = start(conf={"isolated_profile_directory": where})

    calls = [Call(worker, f"by_{profiler}") for _ in range(3)]

    assert all(isinstance(call.value, int) and call.path is None for call in calls)
    (warning,) = re.findall(r"WARNING\S* (.*no profile.*)", worker.log())
    assert re.match(
        rf"task profiled\.by_{profiler}: no profile, its calls run without one: {reason}", warning
    )


def test_where_memray_is_not_there_calls_run_without_it(start: StartWorker) -> None:
    worker = start(env={"WITHOUT_MEMRAY": "1"})

    calls = [Call(worker, "by_memray") for _ in range(2)]

    assert all(isinstance(call.value, int) and call.path is None for call in calls)
    (warning,) = re.findall(r"WARNING\S* (.*no profile.*)", worker.log())
    assert warning.endswith("memray comes with isolated-tasks[profile]")
