"""Prometheus metrics: what each call used, and how the forkserver is.

With the setting ``isolated_prometheus_port`` a worker serves them over HTTP. A program that has an
exporter already adds them to it by `register`.

Everything is recorded where the calls of a worker come to their ends, in its main process, and
never in a child. So there is nothing to collect from several processes: the multiprocess mode of
``prometheus_client``, which keeps a file for each pid, is not needed, and where it is on, these
metrics make no files.

====================================================== ========= ===================================
metric                                                 type      labels
====================================================== ========= ===================================
``isolated_tasks_calls_total``                         counter   ``task``, ``exit_reason``
``isolated_tasks_call_peak_memory_bytes``              histogram ``task``
``isolated_tasks_call_startup_seconds``                histogram ``task``
``isolated_tasks_call_run_seconds``                    histogram ``task``
``isolated_tasks_call_cpu_seconds_total``              counter   ``task``, ``mode``
``isolated_tasks_children``                            gauge
``isolated_tasks_forkserver_up``                       gauge
``isolated_tasks_forkserver_rss_bytes``                gauge
``isolated_tasks_forkserver_starts_total``             counter
``isolated_tasks_forkserver_failures_total``           counter
====================================================== ========= ===================================
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import itertools
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from wsgiref import simple_server

import psutil

from isolated_tasks import requester, signals
from isolated_tasks.process import descendants
from isolated_tasks.process.transport import own
from isolated_tasks.process.usage import ExitReason, Usage

try:
    from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
except ImportError as exc:
    raise ImportError(
        "isolated_tasks.prometheus and the setting isolated_prometheus_port need the package "
        "prometheus_client: pip install 'isolated-tasks[prometheus]'",
        name=exc.name,
    ) from exc

__all__ = ["MEMORY_BUCKETS", "RUN_BUCKETS", "STARTUP_BUCKETS", "MetricsServer", "register", "serve"]

logger = logging.getLogger(__name__)

#: Upper bounds of the peaks of memory, in bytes: the powers of two from 1 MiB to 64 GiB.
MEMORY_BUCKETS = tuple(float(1 << power) for power in range(20, 37))

#: Upper bounds of what a call waits for its body to begin, in seconds: a fork takes milliseconds,
#: a fresh interpreter some tenths, and a budget for memory may keep a call for minutes.
STARTUP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)

#: Upper bounds of what a body runs, in seconds.
RUN_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)


# ── what calls used ─────────────────────────────────────────────────────────────────────────────


class _Histogram:
    """How many values were in each bucket, and what they come to."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        # One more than there are bounds: what is above the last.
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        # A bound is itself in its bucket (`le`).
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Bounds as text, and how many values are not above each."""
        # Not as the library writes its own: releases differ, and a bound is a label, so another
        # text would begin another series.
        texts = [*map(str, self._bounds), "+Inf"]
        return list(zip(texts, itertools.accumulate(self._counts), strict=True))


@dataclass
class _Calls:
    """All calls so far."""

    #: By task and exit reason.
    ended: dict[tuple[str, str], int] = field(default_factory=dict)
    #: CPU seconds, by task and mode.
    cpu: dict[tuple[str, str], float] = field(default_factory=dict)
    #: By task.
    peaks: dict[str, _Histogram] = field(default_factory=dict)
    startups: dict[str, _Histogram] = field(default_factory=dict)
    runs: dict[str, _Histogram] = field(default_factory=dict)

    def add(self, task: str, usage: Usage) -> None:
        if task not in self.startups:
            self._begin(task)
        self.ended[task, str(usage.exit_reason)] += 1
        self.startups[task].observe(usage.start_seconds)
        # What is not known of a process that was killed is left out.
        if usage.tree_peak_bytes is not None:
            self.peaks[task].observe(usage.tree_peak_bytes)
        if usage.wall_seconds is not None:
            self.runs[task].observe(usage.wall_seconds)
        self.cpu[task, "user"] += usage.user_seconds or 0.0
        self.cpu[task, "system"] += usage.system_seconds or 0.0

    def _begin(self, task: str) -> None:
        # Each at 0: rate() does not see the step to a counter's first value, and one that begins
        # with the first lost call would hide just that.
        for reason in ExitReason:
            self.ended[task, str(reason)] = 0
        self.cpu[task, "user"] = self.cpu[task, "system"] = 0.0
        self.peaks[task] = _Histogram(MEMORY_BUCKETS)
        self.startups[task] = _Histogram(STARTUP_BUCKETS)
        self.runs[task] = _Histogram(RUN_BUCKETS)

    def families(self) -> Iterator[Metric]:
        yield _counters(
            "isolated_tasks_calls",
            "Calls of isolated tasks that have ended, by how they did.",
            "exit_reason",
            self.ended,
        )
        yield _counters(
            "isolated_tasks_call_cpu_seconds",
            "CPU time of calls, with that of the descendants that they waited for.",
            "mode",
            self.cpu,
        )
        yield _histograms(
            "isolated_tasks_call_peak_memory_bytes",
            "The most resident memory that the process of a call and its descendants had.",
            self.peaks,
        )
        yield _histograms(
            "isolated_tasks_call_startup_seconds",
            "From the call in the slot to the beginning of its body.",
            self.startups,
        )
        yield _histograms(
            "isolated_tasks_call_run_seconds",
            "From the beginning of a body to its end.",
            self.runs,
        )


def _counters(name: str, text: str, label: str, values: Mapping[tuple[str, str], float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["task", label])
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histograms(name: str, text: str, by_task: dict[str, _Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["task"])
    for task, histogram in by_task.items():
        family.add_metric([task], histogram.buckets(), histogram.sum)
    return family


# ── how the forkserver is ───────────────────────────────────────────────────────────────────────


@dataclass
class _Forkservers:
    """Those of this process, together; usually there is one."""

    up: int = 0
    rss_bytes: int = 0
    children: int = 0
    starts: int = 0
    failures: int = 0


def _look() -> _Forkservers | None:
    """What the launchers and the kernel say now; None where this process has no launcher."""
    launchers = requester.launchers()
    if not launchers:
        return None
    seen = _Forkservers()
    for launcher in launchers:
        seen.up += len(launcher.loaded())
        seen.starts += launcher.starts
        seen.failures += launcher.failures
        for pid in launcher.every_pid():
            # One may be gone by now.
            with contextlib.suppress(psutil.Error):
                seen.rss_bytes += psutil.Process(pid).memory_info().rss
            listed = descendants.listed_children(pid)
            seen.children += len(descendants.children(pid) if listed is None else listed)
    return seen


#: By attribute of `_Forkservers`.
_FORKSERVER_METRICS = {
    "children": (
        GaugeMetricFamily,
        "isolated_tasks_children",
        "Children that live, with spares and those that wait for their next call.",
    ),
    "up": (
        GaugeMetricFamily,
        "isolated_tasks_forkserver_up",
        "Forkservers that have loaded and take calls; at 0 calls wait.",
    ),
    "rss_bytes": (
        GaugeMetricFamily,
        "isolated_tasks_forkserver_rss_bytes",
        "Resident memory of the forkservers, without their children.",
    ),
    "starts": (
        CounterMetricFamily,
        "isolated_tasks_forkserver_starts",
        "Forkservers that were started; all but the first replace another one.",
    ),
    "failures": (
        CounterMetricFamily,
        "isolated_tasks_forkserver_failures",
        "Forkservers that have died, were killed as they did not answer, or could not be started.",
    ),
}


def _forkserver_families(seen: _Forkservers | None) -> Iterator[Metric]:
    for attribute, (make, name, text) in _FORKSERVER_METRICS.items():
        family = make(name, text, labels=())
        if seen is not None:
            family.add_metric((), getattr(seen, attribute))
        yield family


# ── the collector ───────────────────────────────────────────────────────────────────────────────


class _Collector:
    """What a registry asks."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all; in a fork, where another thread may have held the lock, that too."""
        # Reentrant: a signal handler may end a call in the middle of another one's record.
        self._lock = threading.RLock()
        self._calls = _Calls()

    def on_call_finished(self, sender: Any, usage: Usage, **_: Any) -> None:
        """Receive `signals.isolated_call_finished`."""
        with self._lock:
            self._calls.add(sender.name, usage)

    def describe(self) -> Iterable[Metric]:
        """The metrics without their values: a registry asks for these once, for the names."""
        return [*_Calls().families(), *_forkserver_families(None)]

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        with self._lock:
            calls = copy.deepcopy(self._calls)
        return [*calls.families(), *_forkserver_families(_look())]


_collector = _Collector()

# What the main process has counted is not to be told again by a pool process that it forks.
os.register_at_fork(after_in_child=_collector.begin_anew)


def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Add the metrics to a registry, and record calls from now on.

    For programs that export metrics themselves; ``isolated_prometheus_port`` needs no more. To be
    called in the main process of a worker: where the app is imported, or by a receiver of Celery's
    ``worker_init``. Once or more often makes no difference. In a process that is no worker calls
    are recorded that are made there (``isolated_eager``).

    Args:
        registry: Which; that which ``prometheus_client`` uses by default unless another is given.
    """
    signals.isolated_call_finished.connect(_collector.on_call_finished, weak=False)
    with _registering:
        # Asking the registry would have to look into its private parts.
        with contextlib.suppress(KeyError):
            registry.unregister(_collector)
        registry.register(_collector)


_registering = threading.Lock()


# ── the server ──────────────────────────────────────────────────────────────────────────────────


class _HTTPServer(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    daemon_threads = True
    # Some releases of Python share the port of an HTTP server with the next one, which would then
    # get every other scrape, and nobody would be told.
    allow_reuse_port = False


class _Handler(simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape is no event."""


class MetricsServer:
    """Serves the metrics of this process over HTTP, from a thread (under gevent, a greenlet).

    Args:
        host: The address to listen at.
        port: The port; 0 for any that is free.

    Raises:
        OSError: The port is taken, or the address is none of this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        server = _HTTPServer if ":" not in host else _IPv6HTTPServer
        self._server = simple_server.make_server(
            host, port, make_wsgi_app(REGISTRY), server, handler_class=_Handler
        )
        # A pool process that outlives this one, killed, would keep the port from the next worker.
        own(self)
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            # How often it looks whether it is to stop, which the stop of the worker waits for.
            kwargs={"poll_interval": 0.1},
            name="isolated_tasks metrics",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop to listen."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def abandon(self) -> None:
        """Close the listening socket, in a fork of this process."""
        descriptor = self._server.socket.detach()
        if descriptor >= 0:
            os.close(descriptor)


class _IPv6HTTPServer(_HTTPServer):
    address_family = socket.AF_INET6


def serve(host: str, port: int) -> MetricsServer | None:
    """Register the metrics and serve them, for a worker, which is to work without them too.

    Args:
        host: ``isolated_prometheus_host``.
        port: ``isolated_prometheus_port``.

    Returns:
        The server; None where it could not be started, and the log says why.
    """
    register()
    try:
        server = MetricsServer(host, port)
    except (OSError, OverflowError) as exc:
        logger.error(
            "isolated_prometheus_port=%d: no metrics can be served at %s: %s; "
            "each worker of a machine needs a port of its own",
            port,
            host,
            exc,
        )
        return None
    shown = f"[{host}]" if ":" in host else host
    logger.info("metrics are served at http://%s:%d/metrics", shown, server.port)
    return server
