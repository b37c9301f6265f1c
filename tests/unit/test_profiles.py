"""Which call is profiled, and where its file goes; what is said of it."""

import dataclasses
import logging
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from isolated_tasks import IsolatedTask, OptionError, profiles, settings
from isolated_tasks.process.usage import ExitReason, Usage
from isolated_tasks.profiles import Profile, Recording, told
from isolated_tasks.usage import fields, summary

MakeTask = Callable[..., Any]

USAGE = Usage(
    pid=7,
    peak_bytes=1,
    tree_peak_bytes=1 << 20,
    baseline_bytes=1,
    user_seconds=1.0,
    system_seconds=1.0,
    wall_seconds=1.0,
    start_seconds=1.0,
    argument_bytes=1,
    result_bytes=1,
    start_method="forkserver",
    position=1,
    exit_reason=ExitReason.RETURNED,
)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Celery]:
    monkeypatch.setattr(profiles, "_said", set())
    with Celery("profiles", set_as_current=False) as app:
        app.conf.isolated_profile_directory = str(tmp_path)
        yield app


@pytest.fixture
def make_task(app: Celery) -> MakeTask:
    def make(name: str = "tasks.render", **attributes: Any) -> Any:
        @app.task(name=name, shared=False, **{"base": IsolatedTask, **attributes})
        def render() -> None: ...

        return app.tasks[name]

    return make


def chosen(task: Any, task_id: str | None, asked: object) -> Profile | None:
    """As a slot asks."""
    return profiles.chosen(task, task_id, settings.for_slot(task).profiling, asked)


# ── options ─────────────────────────────────────────────────────────────────────────────────────


def test_options_come_from_the_task_and_from_the_app(app: Celery, make_task: MakeTask) -> None:
    app.conf.isolated_profile = "memray"
    app.conf.isolated_profile_every = 100
    app.conf.isolated_profile_directory = Path("/profiles/of/all")

    assert settings.profiling(make_task()) == settings.Profiling("memray", 100, "/profiles/of/all")

    own = make_task(profile="tracemalloc", profile_every=2, profile_directory="/own", name="own")
    assert settings.profiling(own) == settings.Profiling("tracemalloc", 2, "/own")


def test_no_call_is_profiled_where_nobody_has_asked_for_it(make_task: MakeTask) -> None:
    assert chosen(make_task(), "id", None) is None


BAD = [
    *(("profile", value) for value in ["cprofile", "", True, 7, ["memray"], b"memray"]),
    *(("profile_every", value) for value in [0, -1, 1.5, "2", True]),
    *(("profile_directory", value) for value in ["", "profiles", "~/p", 7, b"/p", "/a\0b", Path()]),
]


@pytest.mark.parametrize(("option", "value"), BAD, ids=repr)
def test_a_bad_value_is_refused_and_task_option_and_value_are_named(
    app: Celery, make_task: MakeTask, option: str, value: Any
) -> None:
    with pytest.raises(OptionError) as caught:
        make_task(**{option: value})
    app.conf[f"isolated_{option}"] = value
    with pytest.raises(OptionError):
        make_task(name="tasks.other")

    error = caught.value
    assert (error.task, error.option, error.value) == ("tasks.render", option, repr(value))
    assert str(error).startswith(f"task 'tasks.render': {option}={value!r}: must be ")


# ── which ───────────────────────────────────────────────────────────────────────────────────────


def test_one_call_in_so_many_is_drawn(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(profile="tracemalloc", profile_every=5)
    asked = []

    class Lot:
        def randrange(self, stop: int) -> int:
            asked.append(stop)
            return len(asked) % stop

    monkeypatch.setattr(profiles, "_lot", Lot())

    assert [chosen(task, "id", None) is not None for _ in range(10)] == [*[False] * 4, True] * 2
    assert set(asked) == {5}
    # Who asks for it is not told that it was not his turn.
    assert all(chosen(task, "id", "tracemalloc") for _ in range(10))


def test_a_header_is_for_tasks_without_an_option_too(make_task: MakeTask) -> None:
    profile = chosen(make_task(), "id", "memray")

    assert profile is not None
    assert profile.profiler == "memray"


@pytest.mark.parametrize("word", ["nonesuch", "", 7, [], {}, b"memray", "x" * 10_000])
def test_another_word_in_the_header_is_one_warning(
    make_task: MakeTask, caplog: pytest.LogCaptureFixture, word: object
) -> None:
    task = make_task(profile="memray")

    assert [chosen(task, "id", word) for _ in range(3)] == [None] * 3

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert repr(word)[:100] in record.getMessage()
    assert len(record.getMessage()) < 300


# ── where ───────────────────────────────────────────────────────────────────────────────────────

NAMES = ["..", ".", "../../etc/passwd", "/etc/passwd", ".hidden", "-rf", "a\0b", "a\nb", "é" * 300]


@pytest.mark.parametrize("task_id", [*NAMES, None, "", "x" * 10_000])
@pytest.mark.parametrize("name", ["tasks.render", *NAMES])
def test_a_path_is_one_harmless_name_in_the_directory(
    tmp_path: Path, name: str, task_id: str | None
) -> None:
    path = Path(profiles._path(str(tmp_path), name, task_id, "tracemalloc"))

    assert path.parent == tmp_path
    assert path.resolve() == path
    assert path.name[0] not in ".-"
    path.touch()
    # What lies beside it has a longer one.
    path.with_name(path.name + ".part").touch()


def test_two_calls_of_one_message_have_two_files(make_task: MakeTask) -> None:
    task = make_task(profile="memray")

    paths = [profile.path for _ in range(3) if (profile := chosen(task, "id", None))]

    assert len(set(paths)) == 3


@pytest.mark.parametrize("fault", ["open to others", "a link", "a file"])
def test_a_default_directory_that_is_not_private_is_not_used(
    app: Celery,
    make_task: MakeTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    app.conf.isolated_profile_directory = None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / f"isolated_tasks-profiles-{os.geteuid()}"
    if fault == "a file":
        planted.touch()
    elif fault == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        planted.mkdir()
        planted.chmod(0o770)

    assert chosen(make_task(profile="memray"), "id", None) is None

    assert "is not a private directory of this user" in caplog.text


# ── in the child ────────────────────────────────────────────────────────────────────────────────


def test_tracing_that_is_on_already_stays_on(tmp_path: Path) -> None:
    path = str(tmp_path / "profile")
    tracemalloc.start()
    try:
        with Recording(Profile("tracemalloc", path)):
            kept = bytearray(1 << 20)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()

    assert any(one.size >= len(kept) for one in tracemalloc.Snapshot.load(path).traces)


def test_a_body_that_ends_tracing_does_no_harm(tmp_path: Path) -> None:
    recording = Recording(Profile("tracemalloc", str(tmp_path / "profile")))

    with recording:
        tracemalloc.stop()

    assert recording.problem is not None
    assert recording.problem.startswith("RuntimeError: the tracemalloc module must be tracing")
    assert list(tmp_path.iterdir()) == []


def test_what_a_body_raises_goes_through_untouched(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class FrozenError(Exception):
        number: int

    with pytest.raises(FrozenError), Recording(Profile("tracemalloc", str(tmp_path / "profile"))):
        raise FrozenError(7)

    assert (tmp_path / "profile").exists()
    assert not tracemalloc.is_tracing()


def test_without_a_profile_no_profiler_is_imported() -> None:
    statement = (
        "import sys, isolated_tasks.task, isolated_tasks.profiles as profiles\n"
        "with profiles.Recording(None): pass\n"
        "print(*{'memray', 'tracemalloc'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", statement],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(profiles.__file__).parents[1],
    )

    assert run.stdout.split() == []


# ── what is said ────────────────────────────────────────────────────────────────────────────────


def test_a_path_is_told_where_there_is_a_file(make_task: MakeTask, tmp_path: Path) -> None:
    path = tmp_path / "50%.memray"
    profile = Profile("memray", str(path))
    task = make_task()
    killed = dataclasses.replace(USAGE, exit_reason=ExitReason.MEMORY_LIMIT)

    assert told(task, "id", profile, killed, None).profile_path is None
    path.touch()
    usage = told(task, "id", profile, killed, None)

    assert usage.profile_path == str(path)
    assert summary(usage) == f"peak 1.0 MiB, cpu 2s, pid 7, profile {path}"
    assert fields(usage)["profile_path"] == str(path)
    assert summary(USAGE) == "peak 1.0 MiB, cpu 2s, pid 7"


def test_what_a_killed_process_has_left_of_a_snapshot_is_removed(
    make_task: MakeTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile.part").touch()
    killed = dataclasses.replace(USAGE, exit_reason=ExitReason.OUT_OF_MEMORY)

    told(make_task(), "id", Profile("tracemalloc", str(tmp_path / "profile")), killed, None)

    assert list(tmp_path.iterdir()) == []
    assert "its process was gone (out_of_memory) before tracemalloc had written one" in caplog.text


def test_a_problem_is_told_once_and_in_bounds(
    make_task: MakeTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile("memray", str(tmp_path / "profile"))
    task = make_task()

    # A child may send anything.
    for problem in ("OSError: " + "x" * 10_000, "another", [7]):
        told(task, "id", profile, USAGE, problem)

    (record,) = caplog.records
    assert "OSError: xxx" in record.getMessage()
    assert len(record.getMessage()) < 700
