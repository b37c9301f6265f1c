"""The metrics: what is counted, and how it is told."""

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from isolated_tasks import ExitReason, Usage, prometheus
from isolated_tasks.prometheus import MEMORY_BUCKETS, RUN_BUCKETS, STARTUP_BUCKETS, register
from isolated_tasks.signals import isolated_call_finished

MIB = 1 << 20


def usage(**values: Any) -> Usage:
    known = {
        "pid": 4711,
        "peak_bytes": 3 * MIB,
        "tree_peak_bytes": 3 * MIB,
        "baseline_bytes": MIB,
        "user_seconds": 0.25,
        "system_seconds": 0.5,
        "wall_seconds": 2.0,
        "start_seconds": 0.01,
        "argument_bytes": 100,
        "result_bytes": 100,
        "start_method": "forkserver",
        "position": 1,
        "exit_reason": ExitReason.RETURNED,
    }
    return Usage(**{**known, **values})


class Task:
    name = "tasks.render"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> prometheus._Collector:
    """A fresh one, for all that there is."""
    collector = prometheus._Collector()
    monkeypatch.setattr(prometheus, "_collector", collector)
    # Receivers are found by their identity, and a method has a new one each time.
    monkeypatch.setattr(isolated_call_finished, "receivers", [])
    return collector


@pytest.fixture
def registry(collector: prometheus._Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    register(registry)
    return registry


def finish(**values: Any) -> None:
    isolated_call_finished.send(sender=Task, task_id="1", usage=usage(**values))


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"isolated_tasks_{name}", {"task": Task.name, **labels})


def test_a_call_is_counted_with_what_it_used(registry: CollectorRegistry) -> None:
    finish()
    finish(exit_reason=ExitReason.LOST, tree_peak_bytes=5 * MIB)

    assert value(registry, "calls_total", exit_reason="returned") == 1
    assert value(registry, "calls_total", exit_reason="lost") == 1
    assert value(registry, "call_peak_memory_bytes_sum") == 8 * MIB
    assert value(registry, "call_peak_memory_bytes_count") == 2
    assert value(registry, "call_startup_seconds_sum") == 0.02
    assert value(registry, "call_run_seconds_sum") == 4.0
    assert value(registry, "call_cpu_seconds_total", mode="user") == 0.5
    assert value(registry, "call_cpu_seconds_total", mode="system") == 1.0


def test_a_bound_is_in_its_bucket(registry: CollectorRegistry) -> None:
    for size in (4 * MIB, 4 * MIB + 1, 100 << 30):
        finish(tree_peak_bytes=size)

    counts = [
        value(registry, "call_peak_memory_bytes_bucket", le=bound)
        for bound in ("2097152.0", "4194304.0", "8388608.0", "68719476736.0", "+Inf")
    ]
    assert counts == [0, 1, 2, 2, 3]


def test_what_is_not_known_is_left_out(registry: CollectorRegistry) -> None:
    unknown = ("tree_peak_bytes", "wall_seconds", "user_seconds", "system_seconds")
    finish(**dict.fromkeys(unknown), exit_reason=ExitReason.LOST)

    assert value(registry, "calls_total", exit_reason="lost") == 1
    assert value(registry, "call_startup_seconds_count") == 1
    assert value(registry, "call_peak_memory_bytes_count") == 0
    assert value(registry, "call_run_seconds_count") == 0
    assert value(registry, "call_cpu_seconds_total", mode="user") == 0


def test_each_exit_reason_of_a_task_begins_at_0(registry: CollectorRegistry) -> None:
    finish()

    counts = {
        str(reason): value(registry, "calls_total", exit_reason=str(reason))
        for reason in ExitReason
    }
    assert counts == {**dict.fromkeys(map(str, ExitReason), 0), "returned": 1}


def test_registering_again_and_elsewhere_counts_no_call_twice(registry: CollectorRegistry) -> None:
    other = CollectorRegistry()
    register(registry)
    register(other)
    register(other)

    finish()

    assert value(registry, "calls_total", exit_reason="returned") == 1
    assert value(other, "calls_total", exit_reason="returned") == 1


def test_a_fork_begins_anew_while_another_thread_records(registry: CollectorRegistry) -> None:
    finish()
    collector = prometheus._collector
    lock = collector._lock

    collector.begin_anew()

    assert collector._lock is not lock
    assert value(registry, "calls_total", exit_reason="returned") is None


def test_a_forked_process_does_not_tell_what_its_parent_has_counted() -> None:
    # The one of the module, which is the one that forks know of.
    prometheus._collector.on_call_finished(Task, usage())
    try:
        pid = os.fork()
        if not pid:
            os._exit(bool(prometheus._collector._calls.ended))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert prometheus._collector._calls.ended
    finally:
        prometheus._collector.begin_anew()


def test_a_process_without_a_forkserver_says_nothing_of_one(registry: CollectorRegistry) -> None:
    text = generate_latest(registry).decode()

    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert "isolated_tasks_forkserver_up" in families
    assert [family.name for family in families.values() if family.samples] == []


def test_buckets_rise_and_memory_s_are_the_powers_of_two() -> None:
    for bounds in (MEMORY_BUCKETS, STARTUP_BUCKETS, RUN_BUCKETS):
        assert list(bounds) == sorted(set(bounds))
    assert MEMORY_BUCKETS[0] == MIB
    assert MEMORY_BUCKETS[-1] == 64 << 30
    assert {high / low for low, high in itertools.pairwise(MEMORY_BUCKETS)} == {2}


def test_the_table_of_the_module_has_each_metric(collector: prometheus._Collector) -> None:
    told = {
        f"{one.name}_total" if one.type == "counter" else one.name for one in collector.describe()
    }

    rows = [line for line in (prometheus.__doc__ or "").splitlines() if line.startswith("``isol")]
    assert {row.split("``")[1] for row in rows} == told


def test_without_prometheus_client_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None; import isolated_tasks.prometheus"
    )

    run = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)

    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in ("isolated_prometheus_port", "prometheus_client", "isolated-tasks[prometheus]"):
        assert part in last


def test_a_worker_without_the_setting_does_not_need_prometheus_client() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None; import isolated_tasks.worker as w; "
        "from celery import Celery; print(w._serve_metrics(Celery()))"
    )

    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)

    assert run.stdout == "None\n"


def test_a_port_that_is_taken_is_an_error_of_the_log_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = prometheus.serve("127.0.0.1", 0)
    assert first is not None
    try:
        assert prometheus.serve("127.0.0.1", first.port) is None
    finally:
        first.close()

    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"isolated_prometheus_port={first.port}" in error.getMessage()


def test_an_address_of_ipv6_is_listened_at() -> None:
    server = prometheus.serve("::1", 0)
    if server is None:
        pytest.skip("this machine has no IPv6")
    server.close()
