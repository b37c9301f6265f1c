"""The verdicts on plain tasks, and the figures that lead to them."""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from isolated_tasks.advice import (
    BATCH_SIZES,
    ENOUGH_CALLS,
    WARM_UP_CALLS,
    Advice,
    Call,
    TaskFigures,
    Verdict,
    advise,
    size,
)

KIB, MIB = 1 << 10, 1 << 20

#: As the audit samples them.
SAMPLED = {2, 4, 8, 16, 32, 64}

Added = Iterable[tuple[float, float | None]]


def figures(
    added: Added,
    *,
    peak: float = MIB,
    idle: Callable[[int], float] | None = None,
    collected: Callable[[int], float] | None = None,
    into: TaskFigures | None = None,
    process: tuple[str, int] = ("w1", 1),
    seconds: float = 0.01,
) -> TaskFigures:
    """A task whose calls have added this to RSS and to the memory in use; None: nobody tells.

    `collected` is what is in use and resident after so many calls if ``gc.collect()`` came before.
    """
    task = into or TaskFigures("t")
    kept = used = 0.0
    known = True
    for number, (rss, in_use) in enumerate(added, start=1):
        is_sampled = number in SAMPLED
        if is_sampled and collected is not None:
            kept = used = collected(number - 1)
        call = Call(
            number=number,
            highest_peak_bytes=int(peak),
            kept_bytes=int(kept),
            run_seconds=seconds,
            used_calls=number - 1 if known else 0,
            used_bytes=int(used) if known and number > 1 else None,
            idle_bytes=int(idle(number)) if idle else int(kept - used) if known else None,
            least_idle_bytes=int(idle(number)) if idle else int(kept - used) if known else None,
            collected_bytes=int(rss) if is_sampled else None,
            blocks=3 if is_sampled else None,
        )
        task.add(process, call)
        kept += rss
        known = in_use is not None
        used += in_use or 0
    return task


def verdict(*arguments: Any, **keywords: Any) -> Verdict:
    return advise(figures(*arguments, **keywords)).verdict


def steadily(rss: float, used: float | None, *, calls: int = 20, first: float = 0) -> Added:
    return [(first, 0 if used is not None else None), *[(rss, used)] * (calls - 1)]


# ── fine ────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_that_adds_nothing_is_fine() -> None:
    assert verdict(steadily(0, 0)) is Verdict.FINE


def test_a_task_that_peaks_and_frees_is_fine_and_its_peak_is_told() -> None:
    advice = advise(figures(steadily(0, 0), peak=1500 * MIB))

    assert advice.verdict is Verdict.FINE
    assert (advice.peak_bytes, advice.batch_size, advice.action) == (1500 * MIB, None, "")
    assert "1.5 GiB" in advice.because


def test_what_the_first_calls_import_is_not_growth() -> None:
    added = [(60 * MIB, 60 * MIB), (5 * MIB, 5 * MIB), (MIB, MIB), *[(0.0, 0.0)] * 20]

    assert verdict(added, peak=70 * MIB) is Verdict.FINE


def test_a_single_leap_is_not_growth() -> None:
    leap = [(0.0, 0.0)] * 12 + [(50.0 * MIB, 50.0 * MIB)] + [(0.0, 0.0)] * 8

    assert verdict(leap) is Verdict.FINE


def test_a_cache_that_fills_up_is_not_growth() -> None:
    filling = [(MIB, MIB)] * 12 + [(0, 0)] * 18

    assert verdict(filling) is Verdict.FINE


def test_reference_cycles_that_the_collector_gets_back_are_not_growth() -> None:
    advice = advise(figures(steadily(MIB, MIB, calls=63), collected=lambda calls: 2.0 * MIB))

    assert advice.verdict is Verdict.FINE
    assert "reference cycles" in advice.because


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_growth(seed: int) -> None:
    draw = random.Random(seed).uniform
    levels = [draw(-1, 1) * MIB for _ in range(60)]
    added = [(after - before, 0) for before, after in itertools.pairwise(levels)]

    assert verdict(added) is Verdict.FINE


def test_a_task_that_only_needs_back_what_a_leak_has_taken_is_not_said_to_grow() -> None:
    # It adds to RSS each time, and the idle memory of the process stays as it is.
    victim = steadily(MIB, 0, first=10 * MIB)

    assert verdict(victim, peak=12 * MIB, idle=lambda number: 10 * MIB) is Verdict.FINE


# ── grows ───────────────────────────────────────────────────────────────────────────────────────


def test_a_leak_grows_and_its_size_is_told() -> None:
    advice = advise(figures(steadily(MIB, MIB)))

    assert advice.verdict is Verdict.GROWS
    assert advice.kept_per_call_bytes == MIB
    assert "1.0 MiB" in advice.because


def test_a_leak_that_fills_the_holes_of_others_grows() -> None:
    assert verdict(steadily(0, MIB), idle=lambda number: (40 - number) * MIB) is Verdict.GROWS


def test_a_leak_that_nobody_has_told_the_allocators_of_grows() -> None:
    assert verdict(steadily(MIB, 0)) is Verdict.GROWS


def test_a_leak_grows_where_allocators_do_not_tell() -> None:
    advice = advise(figures(steadily(MIB, None)))

    assert (advice.verdict, advice.kept_per_call_bytes) == (Verdict.GROWS, MIB)


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_grows_beneath_noise(seed: int) -> None:
    draw = random.Random(seed).uniform
    levels = [number * MIB + draw(-1, 1) * MIB for number in range(40)]
    added = [(after - before, after - before) for before, after in itertools.pairwise(levels)]

    assert verdict(added) is Verdict.GROWS


def test_a_small_leak_takes_more_calls_to_be_said_to_grow() -> None:
    few, many = steadily(20 * KIB, 20 * KIB), steadily(20 * KIB, 20 * KIB, calls=300)

    assert (verdict(few), verdict(many)) == (Verdict.FINE, Verdict.GROWS)


def test_a_leak_in_steps_of_an_allocator_grows() -> None:
    arena = [(0, None), (0, None), (0, None), (MIB, None)] * 20

    assert verdict(arena) is Verdict.GROWS


def test_a_leak_that_reference_cycles_are_not_to_blame_for_grows() -> None:
    task = figures(steadily(MIB, MIB, calls=40), collected=lambda calls: calls * MIB)

    assert advise(task).verdict is Verdict.GROWS


def test_a_leak_grows_in_processes_that_serve_few_calls_each() -> None:
    task = TaskFigures("t")
    for pid in range(5):
        figures(steadily(MIB, MIB, calls=WARM_UP_CALLS + 3), into=task, process=("w1", pid))

    advice = advise(task)

    assert (advice.verdict, advice.processes, advice.calls) == (Verdict.GROWS, 5, 30)


def test_a_leak_grows_for_who_listens_later_and_misses_events() -> None:
    all_calls = list(figures(steadily(MIB, MIB, calls=400)).processes["w1", 1].after_warm_up)
    task = TaskFigures("t")
    for call in all_calls[200::3]:
        task.add(("w1", 1), call)

    advice = advise(task)

    assert (advice.verdict, advice.kept_per_call_bytes) == (Verdict.GROWS, MIB)


# ── keeps its peak ──────────────────────────────────────────────────────────────────────────────


def test_a_task_whose_peak_stays_with_the_process_keeps_it() -> None:
    advice = advise(figures(steadily(0, 0, first=90 * MIB), peak=100 * MIB))

    assert advice.verdict is Verdict.KEEPS_ITS_PEAK
    assert "90.0 MiB" in advice.because
    assert "100.0 MiB" in advice.because


def test_so_it_does_where_allocators_do_not_tell() -> None:
    kept = steadily(0, None, first=90 * MIB)

    assert verdict(kept, peak=100 * MIB) is Verdict.KEEPS_ITS_PEAK


def test_what_is_in_use_is_no_peak_that_is_kept() -> None:
    model = [(90 * MIB, 90 * MIB), *[(0, 0)] * 20]

    assert verdict(model, peak=100 * MIB) is Verdict.FINE


@pytest.mark.parametrize(("kept", "peak"), [(40, 100), (10, 12)])
def test_part_of_a_peak_or_little_of_one_is_fine(kept: int, peak: int) -> None:
    assert verdict(steadily(0, 0, first=kept * MIB), peak=peak * MIB) is Verdict.FINE


def test_a_process_that_has_given_back_meanwhile_does_not_keep_it() -> None:
    kept = steadily(0, 0, first=90 * MIB)

    assert verdict(kept, peak=100 * MIB, idle=lambda number: MIB) is Verdict.FINE


def test_a_task_does_not_hold_more_idle_than_its_peak() -> None:
    task = figures(steadily(MIB, 0, first=40 * MIB), peak=44 * MIB, idle=lambda number: 45 * MIB)

    advice = advise(task)

    assert (advice.verdict, advice.idle_bytes) == (Verdict.KEEPS_ITS_PEAK, 44 * MIB)


# ── no verdict ──────────────────────────────────────────────────────────────────────────────────


def test_few_calls_give_no_verdict() -> None:
    needed = WARM_UP_CALLS + ENOUGH_CALLS + 1

    assert verdict(steadily(MIB, MIB, calls=needed)) is Verdict.GROWS
    advice = advise(figures(steadily(MIB, MIB, calls=needed - 1)))
    assert (advice.verdict, advice.batch_size) == (Verdict.TOO_FEW_CALLS, None)
    assert f"{ENOUGH_CALLS} are needed" in advice.because


def test_one_call_gives_no_verdict() -> None:
    assert verdict(steadily(MIB, MIB, calls=1)) is Verdict.TOO_FEW_CALLS


def test_what_cannot_be_measured_is_said_to_be_so_and_why() -> None:
    task = TaskFigures("t", unmeasurable={"w1": "threads share a process"})

    advice = advise(task)

    assert advice.verdict is Verdict.UNMEASURABLE
    assert advice.because == "w1: threads share a process"


def test_a_worker_that_cannot_measure_is_named_beside_one_that_can() -> None:
    task = figures(steadily(0, 0))
    task.unmeasurable["w2"] = "threads share a process"

    advice = advise(task)

    assert advice.verdict is Verdict.FINE
    assert "w2 could not measure: threads share a process" in advice.because


# ── what to do ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("seconds", "action"),
    [
        (60.0, "isolate"),
        (0.2, "isolate"),
        (0.1, "isolate, batch_size=2"),
        (0.01, "isolate, batch_size=20"),
        (0.0, "isolate, batch_size=100"),
    ],
)
def test_short_calls_share_a_process(seconds: float, action: str) -> None:
    task = figures(steadily(0, 0, first=90 * MIB), peak=100 * MIB, seconds=seconds)

    assert advise(task).action == action


@pytest.mark.parametrize(("leak", "batch_size"), [(1, 50), (10, 5), (100, 1)])
def test_a_leak_bounds_the_batch(leak: int, batch_size: int) -> None:
    task = figures(steadily(leak * MIB, leak * MIB), peak=leak * MIB, seconds=0.0)

    assert advise(task).batch_size == batch_size


def test_a_batch_of_a_large_task_may_grow_by_its_peak() -> None:
    task = figures(steadily(100 * MIB, 100 * MIB), peak=1000 * MIB, seconds=0.0)

    assert advise(task).batch_size == 10


def test_sizes_to_suggest_rise_from_one() -> None:
    assert BATCH_SIZES[0] == 1
    assert list(BATCH_SIZES) == sorted(set(BATCH_SIZES))


# ── the rest ────────────────────────────────────────────────────────────────────────────────────


def test_what_was_measured_after_a_collection_is_told() -> None:
    advice = advise(figures(steadily(MIB, MIB)))

    assert (advice.collected_per_call_bytes, advice.blocks_per_call) == (MIB, 3)


def test_many_calls_are_judged_in_little_time_and_memory() -> None:
    task = figures(steadily(MIB, MIB, calls=5000))

    advice = advise(task)

    assert (advice.verdict, advice.calls) == (Verdict.GROWS, 5000)
    assert len(task.processes["w1", 1].after_warm_up) <= 500


def test_verdicts_are_told_apart_by_severity() -> None:
    assert [one.value for one in sorted(Verdict, key=lambda one: one.severity)] == [
        "unmeasurable",
        "too few calls",
        "fine",
        "keeps its peak",
        "grows",
    ]


def test_the_action_belongs_to_the_advice() -> None:
    assert Advice("t", Verdict.GROWS, "", 1, 1, batch_size=20).action == "isolate, batch_size=20"


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(0, "0 KiB"), (1500, "1 KiB"), (MIB, "1.0 MiB"), (-3 * MIB, "-3.0 MiB"), (2 << 30, "2.0 GiB")],
)
def test_sizes_are_written_for_people(bytes_: int, text: str) -> None:
    assert size(bytes_) == text
