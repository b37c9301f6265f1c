"""One run: a worker is started, its tasks are sent, its process tree is sampled all the while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rss_comparison.figures import Run, Stage
from rss_comparison.options import PING_NAME, TASK_NAME, Options, Variant
from support import interruption
from support.connection import Client, Connection
from support.memory import Sample
from support.worker import STALL_TIMEOUT, Worker, command

SAMPLE_INTERVAL = 0.05

START_TIMEOUT = 60.0

#: A worker is at rest when, for this long, no process came or went and its RSS kept still.
REST_SECONDS = 1.5
REST_BYTES = 2_000_000
#: Longer than a batch child waits for its next call (`batch_idle_timeout`, 5 s by default). What
#: is not at rest by then is measured as it is.
REST_TIMEOUT = 30.0

#: Outcomes come about in the order of the calls; no need to ask for thousands at every sample.
ASKED_AT_ONCE = 50


def measure(
    run: Run,
    options: Options,
    *,
    connection: Connection,
    client: Client,
    data: Path,
    folder: Path,
    changed: Callable[[], None],
) -> None:
    """Fill in `run` from a worker that is started, used and stopped here.

    Args:
        data: The file that every task works through.
        folder: For what the worker writes; an existing one, of this run alone.
        changed: Called whenever there is something new to show.

    Raises:
        WorkerFailed: The worker or one of its tasks failed.
    """
    environment = {**connection.environment(), **run.variant.environment()}
    line = _command(run.variant, options)
    with Worker(run.variant.label, line=line, environment=environment, folder=folder) as worker:
        watch = _Watch(run, worker, client, changed)
        watch.enter(Stage.STARTING)
        watch.outcomes([client.send(PING_NAME)], timeout=START_TIMEOUT)
        slots = options.concurrency if options.pool == "prefork" else 0
        run.baseline = watch.rest(least=1 + slots, most=sys.maxsize)

        watch.enter(Stage.WORKING)
        run.began_at = time.monotonic()
        calls = [client.send(TASK_NAME, str(data)) for _ in range(run.tasks)]
        watch.outcomes(calls, timeout=STALL_TIMEOUT, on_result=watch.count)
        run.ended_at = time.monotonic()

        watch.enter(Stage.IDLE)
        run.after = watch.rest(least=1 + slots, most=run.baseline.processes)
        watch.note_left_behind()
    client.forget()
    watch.enter(Stage.FINISHED)


def _command(variant: Variant, options: Options) -> list[str]:
    line = command("rss_comparison.app", "--hostname", f"{variant.name}@compare-rss")
    line += ["--pool", options.pool, "--concurrency", str(options.concurrency)]
    if variant.max_tasks_per_child is not None:
        line += ["--max-tasks-per-child", str(variant.max_tasks_per_child)]
    return line


class _Watch:
    """Samples the worker while it waits for something."""

    def __init__(
        self, run: Run, worker: Worker, client: Client, changed: Callable[[], None]
    ) -> None:
        self._run = run
        self._worker = worker
        self._client = client
        self._changed = changed
        self._left: dict[int, tuple[int, int]] = {}

    def enter(self, stage: Stage) -> None:
        self._run.stage = stage
        self._changed()

    def tick(self) -> None:
        """Sample once, and wait until the next sample is due."""
        try:
            interruption.check()
        except interruption.Interrupted:
            self.enter(Stage.STOPPING)  # which takes some seconds: say so at once
            raise
        self._worker.check()
        sample = self._worker.sample()
        self._run.samples.append(sample)
        self._changed()
        time.sleep(max(0.0, sample.at + SAMPLE_INTERVAL - time.monotonic()))

    def outcomes(
        self,
        calls: list[str],
        *,
        timeout: float,
        on_result: Callable[[Any], None] = lambda result: None,
    ) -> None:
        """Wait until every call has an outcome, and none of them for longer than `timeout`."""
        heard = time.monotonic()
        while calls:
            self.tick()
            asked, later = calls[:ASKED_AT_ONCE], calls[ASKED_AT_ONCE:]
            pending = []
            for call in asked:
                outcome = self._client.outcome(call)
                if outcome is None:
                    pending.append(call)
                    continue
                heard = time.monotonic()
                if not outcome.succeeded:
                    raise self._worker.failure(f"failed a task: {outcome.result!r}")
                on_result(outcome.result)
            calls = pending + later
            if time.monotonic() - heard > timeout:
                raise self._worker.failure(f"gave no outcome for {timeout:.0f} s")

    def count(self, summary: dict[str, Any]) -> None:
        """Note one result of the body."""
        self._run.done += 1
        self._left[summary["pid"]] = (summary["left_objects"], summary["left_bytes"])

    def note_left_behind(self) -> None:
        """Add up what bodies left behind in those processes that are still there."""
        kept = [left for pid, left in self._left.items() if self._worker.holds(pid)]
        self._run.left_objects = sum(objects for objects, _ in kept)
        self._run.left_bytes = sum(weight for _, weight in kept)

    def rest(self, *, least: int, most: int) -> Sample:
        """Wait until the worker is at rest with a number of processes within these limits."""
        began = time.monotonic()
        while True:
            self.tick()
            samples = self._run.samples
            recent = [s for s in samples[-200:] if s.at >= samples[-1].at - REST_SECONDS]
            waited = samples[-1].at - began
            if waited > REST_TIMEOUT or (
                waited > REST_SECONDS
                and all(least <= s.processes <= most for s in recent)
                and len({s.processes for s in recent}) == 1
                and max(s.rss_bytes for s in recent) - min(s.rss_bytes for s in recent) < REST_BYTES
            ):
                return samples[-1]
