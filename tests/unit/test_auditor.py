"""What comes of the events of many workers."""

from typing import Any

from isolated_tasks.advice import Verdict
from isolated_tasks.auditor import Auditor

MIB = 1 << 20


def event(name: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "type": "memory-audit",
        "name": name,
        "hostname": "w1@h",
        "pid": 7,
        "number": number,
        "highest_peak_bytes": 10 * MIB,
        "kept_bytes": 0,
        "run_seconds": 0.1,
        "used_calls": number - 1,
        "used_bytes": 0,
        "idle_bytes": 0,
        "least_idle_bytes": 0,
        "collected_bytes": None,
        "blocks": None,
        **fields,
    }


def refusal(name: str) -> dict[str, Any]:
    return {"name": name, "hostname": "w2@h", "pid": 8, "unmeasurable": "threads"}


def test_processes_are_told_apart_by_worker_and_pid() -> None:
    auditor = Auditor()

    for place in ({}, {"pid": 8}, {"hostname": "w2@h"}):
        auditor.add(event("t", **place))

    (advice,) = auditor.advice()
    assert (advice.calls, advice.processes, advice.workers) == (3, 3, ("w1@h", "w2@h"))


def test_only_the_tasks_asked_for_are_looked_at_and_all_of_them() -> None:
    auditor = Auditor(["b", "a"])

    auditor.add(event("b"))
    auditor.add(event("c"))

    assert {advice.task: advice.calls for advice in auditor.advice()} == {"a": 0, "b": 1}


def test_the_most_severe_come_first() -> None:
    auditor = Auditor()
    for number in range(1, 20):
        for name, leak in (("fine", 0), ("leak", MIB), ("a larger leak", 2 * MIB)):
            kept = (number - 1) * leak
            auditor.add(event(name, number, kept_bytes=kept, used_bytes=kept))
    auditor.add(event("few"))
    auditor.add(refusal("unmeasurable"))

    assert [(advice.task, advice.verdict) for advice in auditor.advice()] == [
        ("a larger leak", Verdict.GROWS),
        ("leak", Verdict.GROWS),
        ("fine", Verdict.FINE),
        ("few", Verdict.TOO_FEW_CALLS),
        ("unmeasurable", Verdict.UNMEASURABLE),
    ]


def test_calls_are_waited_for_of_each_task() -> None:
    auditor = Auditor()
    assert not auditor.has_heard(1)

    auditor.add(event("a"))
    assert auditor.has_heard(1)
    assert not auditor.has_heard(2)

    auditor.add(event("b"))
    auditor.add(event("a", 2))
    assert not auditor.has_heard(2)

    auditor.add(event("b", 2))
    assert auditor.has_heard(2)


def test_tasks_asked_for_are_waited_for_before_they_are_heard_of() -> None:
    auditor = Auditor(["a", "b"])

    auditor.add(event("a"))

    assert not auditor.has_heard(1)


def test_what_cannot_be_measured_is_not_waited_for() -> None:
    auditor = Auditor(["a"])

    auditor.add(refusal("a"))
    assert auditor.has_heard(5)

    auditor.add(event("a"))
    assert not auditor.has_heard(5)
