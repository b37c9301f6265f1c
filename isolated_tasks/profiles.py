"""Memory profiles of calls: which call has one, where its file is, and what is said of it.

The slot decides all of it before the call (`chosen`), so that it knows the path of a profile whose
process is killed. In the child a `Recording` stands around the body. Afterwards the slot looks
whether the file is there (`told`).

A profile never makes a call fail: what goes wrong with it is a warning in the worker's log. There
is one in each process for each task and what is wrong, its header, its directory or its profiler:
a directory that is missing would else fill the log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import logging
import os
import random
import re
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from isolated_tasks import settings
from isolated_tasks.process.usage import ExitReason, Usage

if TYPE_CHECKING:
    from isolated_tasks.task import IsolatedMixin

__all__ = ["HEADER", "Profile", "Recording", "chosen", "told"]

logger = logging.getLogger(__name__)

#: The header of a message whose call is to be profiled, whatever its task says: which profiler.
HEADER = "isolated_profile"

#: tracemalloc keeps so many frames of each block that is allocated.
FRAMES = 10
#: In the text beside a snapshot of tracemalloc's.
TOP_LINES = 25

#: A name may have 255 bytes, see `_path`.
_LONGEST_TASK = 100
_LONGEST_ID = 100
_LONGEST_PROBLEM = 500

#: From the kernel: slots are forked, and would all draw the same from one that has a state.
_lot = random.SystemRandom()


@dataclass(frozen=True)
class Profile:
    """One that is to be made of a call."""

    #: ``"memray"`` or ``"tracemalloc"``.
    profiler: str
    #: Of its file; what is being written lies beside it, under another name.
    path: str


# ── in the slot ─────────────────────────────────────────────────────────────────────────────────

#: What was complained of already: the task, and what is wrong.
_said: set[tuple[str, str]] = set()


def chosen(
    task: IsolatedMixin, task_id: str | None, said: settings.Profiling, asked: object
) -> Profile | None:
    """The profile that is to be made of a call, if any.

    Args:
        task: Whose call it is.
        task_id: The message's; None for an errback in the main process.
        said: What its options say.
        asked: What the `HEADER` of the message says, None where there is none. It goes before
            ``profile`` and ``profile_every``.
    """
    profiler = said.profiler if asked is None else asked
    if profiler is None:
        return None
    if asked is None and said.every > 1 and _lot.randrange(said.every):
        return None
    # Whoever sends a message chooses the header, so a bad one is no error of the task's.
    if profiler not in settings.PROFILERS:
        rule = " or ".join(map(repr, settings.PROFILERS))
        _warn_once(task, "header", f"header {HEADER}={profiler!r:.100}: must be {rule}")
        return None
    assert isinstance(profiler, str)
    try:
        directory = _default_directory() if said.directory is None else _usable(said.directory)
    except OSError as exc:
        _warn_once(task, "directory", f"profile_directory: {exc}")
        return None
    return Profile(profiler, _path(directory, task.name, task_id, profiler))


def told(
    task: IsolatedMixin, task_id: str | None, profile: Profile, usage: Usage, problem: object
) -> Usage:
    """What a call used, with the path of its profile, if that has become something.

    Args:
        task: Whose call it was.
        task_id: The message's.
        profile: What was `chosen`.
        usage: What the call used.
        problem: What its `Recording` had to complain of; None where it sent nothing.
    """
    if problem is not None:
        _warn_once(task, "profiler", str(problem)[:_LONGEST_PROBLEM])
    if os.path.exists(profile.path):
        return dataclasses.replace(usage, profile_path=profile.path)
    with contextlib.suppress(OSError):
        # Its process was killed while it wrote.
        os.unlink(_unfinished(profile.path))
    if problem is None and usage.exit_reason not in (ExitReason.RETURNED, ExitReason.RAISED):
        logger.warning(
            "task %s[%s]: no profile: its process was gone (%s) before %s had written one%s",
            task.name,
            task_id,
            usage.exit_reason,
            profile.profiler,
            ""
            if profile.profiler == "memray"
            else ", which it does when the body has ended; memray writes as it goes",
        )
    return usage


def _warn_once(task: IsolatedMixin, what: str, reason: str) -> None:
    # Reasons themselves differ from call to call: there is a path in them.
    if (task.name, what) not in _said:
        _said.add((task.name, what))
        logger.warning("task %s: no profile, its calls run without one: %s", task.name, reason)


def _path(directory: str, task: str, task_id: str | None, profiler: str) -> str:
    """Where the profile of a call goes: ``<directory>/<task>-<id>-<time>.<profiler>``."""
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    # Of a task's name the end tells more.
    parts = _harmless(task[-_LONGEST_TASK:]), _harmless((task_id or "no-id")[:_LONGEST_ID]), moment
    return os.path.join(directory, f"{'-'.join(parts)}.{profiler}")


def _harmless(text: str) -> str:
    """A part of a name of a file: no slash, nothing that a shell would read, not hidden."""
    return re.sub(r"^\.|[^\w.-]|^-", "_", text, flags=re.ASCII)


def _usable(directory: str) -> str:
    """The directory that somebody has chosen.

    It is not made: a volume that is not mounted would be missed by nobody.

    Raises:
        OSError: Nothing can be written there.
    """
    os.stat(directory)
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory!r} is no directory that can be written to")
    return directory


def _default_directory() -> str:
    """One of this user's own, made if it is not there.

    Raises:
        OSError: It cannot be made, or others can write there: anybody may make it before us.
    """
    path = os.path.join(tempfile.gettempdir(), f"isolated_tasks-profiles-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path!r} is not a private directory of this user")
    return path


# ── in the child ────────────────────────────────────────────────────────────────────────────────


class Recording:
    """Profiles the body that it is around; without a profile it does nothing.

    Not one of ``@contextmanager``, as `limits.Limits` is none. It belongs around those: what a
    profiler needs for itself is then no part of what the body may use, and no signal cuts it short.

    Args:
        profile: Which.
    """

    def __init__(self, profile: Profile | None) -> None:
        self._profile = profile
        self._finish: Callable[[], object] | None = None
        self._pid = os.getpid() if profile is not None else None
        #: Why there is no profile; None as long as all is well.
        self.problem: str | None = None

    def __enter__(self) -> None:
        if self._profile is None:
            return
        start = _start_memray if self._profile.profiler == "memray" else _start_tracemalloc
        try:
            self._finish = start(self._profile.path)
        except Exception as exc:
            self.problem = _described(exc)

    def __exit__(self, *_: object) -> None:
        # A copy that the body has forked comes by here too, if it returns.
        if self._finish is None or os.getpid() != self._pid:
            return
        try:
            self._finish()
        except Exception as exc:
            self.problem = _described(exc)


def _start_memray(path: str) -> Callable[[], object]:
    try:
        import memray
    except ImportError as exc:
        raise ImportError(f"{exc}; memray comes with isolated-tasks[profile]") from exc
    # The path is this call's own. What may be there is of a child that went before it had begun.
    tracker = memray.Tracker(destination=memray.FileDestination(path, overwrite=True))
    tracker.__enter__()
    return lambda: tracker.__exit__(None, None, None)


def _start_tracemalloc(path: str) -> Callable[[], object]:
    import tracemalloc

    # PYTHONTRACEMALLOC, or a module that wants it always.
    is_ours = not tracemalloc.is_tracing()
    if is_ours:
        tracemalloc.start(FRAMES)
    tracemalloc.reset_peak()

    def finish() -> None:
        held, peak = tracemalloc.get_traced_memory()
        try:
            snapshot = tracemalloc.take_snapshot()
        finally:
            if is_ours:
                tracemalloc.stop()
        with open(f"{path}.txt", "w", encoding="utf-8") as file:
            file.write(f"peak: {peak} bytes\nheld when the body had ended: {held} bytes\n")
            for line in snapshot.statistics("lineno")[:TOP_LINES]:
                frame = line.traceback[0]
                source = linecache.getline(frame.filename, frame.lineno).strip()
                file.write(f"\n{line}\n    {source}\n")
        snapshot.dump(_unfinished(path))
        # A file that is there is whole.
        os.replace(_unfinished(path), path)

    return finish


def _unfinished(path: str) -> str:
    return f"{path}.part"


def _described(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
