"""Whatever a task may do, and whatever a caller may see, is the same with IsolatedTask.

`rows` says how the table grows.
"""

import difflib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from contract import observation
from contract.running import Running
from contract.table import Row, Seen, all_rows
from harness.worker import POOLS

# The first test of a pool runs all rows; the others only look at what came of them.
pytestmark = pytest.mark.timeout(300)

COMBINATIONS = [(pool, broker) for broker in ("redis", "amqp") for pool in POOLS]

CASES = [
    pytest.param(combination, row, id=f"{'-'.join(combination)}-{row.name}")
    for combination in COMBINATIONS
    for row in all_rows()
    if row.runs_in(*combination)
]

in_each_combination = pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)


@pytest.mark.parametrize(("combination", "row"), CASES)
def test_an_isolated_task_is_like_a_plain_one(running: Running, row: Row) -> None:
    isolated = running.isolated.rows[row.name]
    if row.differs is not None:
        assert_expected(isolated, row.differs.isolated)
    if not row.plain:
        return
    plain = running.plain.rows[row.name]
    assert_expected(plain, row.expects)
    if row.differs is None:
        assert_same(plain, isolated)
    elif row.differs.only:
        assert_same(without(plain, row.differs.only), without(isolated, row.differs.only))


@in_each_combination
def test_nothing_is_left_undone(running: Running) -> None:
    assert [side.unsettled for side in running.sides] == ["", ""]
    assert [side.exit_code for side in running.sides] == [0, 0]
    assert [side.killed for side in running.sides] == [False, False]
    assert [side.leaked for side in running.sides] == [[], []]


@in_each_combination
def test_nothing_else_is_logged_that_needs_attention(running: Running) -> None:
    assert running.isolated.other_log == running.plain.other_log


@in_each_combination
def test_the_recorder_has_missed_nothing(running: Running) -> None:
    # Celery logs what a receiver of a signal raises, and goes on.
    assert ["Signal handler" in side.log for side in running.sides] == [False, False]


@in_each_combination
def test_isolated_bodies_are_isolated(running: Running) -> None:
    # Or every row would compare a plain task with a plain one.
    assert [side.elsewhere > 0 for side in running.sides] == [False, True]


def test_each_row_has_a_name_of_its_own() -> None:
    names = Counter(row.name for row in all_rows())

    assert [name for name, count in names.items() if count > 1] == []


def assert_expected(seen: Seen, expects: Mapping[str, Any]) -> None:
    missed = observation.check(seen, expects)
    if missed:
        pytest.fail("not as the row expects:\n" + "\n".join(missed), pytrace=False)


#: Traps in which a naive isolation falls, by the number that a row's `trap` has; these are held by
#: tests of their own, for they are about more than one call or one worker.
TRAPS_ELSEWHERE = {
    3: "celery/test_after_failure.py::"
    "test_a_lost_child_goes_back_to_the_broker_where_a_lost_slot_would",
    4: "limits/test_limits.py::test_a_revoked_body_is_ended",
    5: "limits/test_worker_limits.py::test_a_limit_of_the_worker_ends_the_body_and_no_slot",
    6: "limits/test_limits.py::test_a_soft_time_limit_that_is_not_handled_fails_the_call",
    13: "limits/test_limits.py::test_a_revoked_body_is_ended",
    14: "limits/test_shutdown.py::test_a_cold_shutdown_ends_a_body",
    15: "limits/test_shutdown.py::test_a_cold_shutdown_ends_a_body",
    16: "celery/test_shutdown.py::test_an_interrupt_from_the_terminal_lets_a_body_finish",
    17: "celery/test_shutdown.py::test_a_warm_shutdown_lets_a_body_finish",
    18: "celery/test_every_pool.py::test_a_plain_task_runs_while_an_isolated_body_is_busy",
    19: "celery/test_every_pool.py::test_isolated_bodies_run_at_the_same_time",
    20: "celery/test_requester_dies.py::test_a_killed_worker_takes_its_bodies_along",
    23: "celery/test_setting.py::test_a_body_finds_the_process_that_a_plain_one_finds",
    24: "celery/test_setting.py::test_no_connection_is_shared_with_anyone",
}


def test_every_trap_is_held_by_a_row_or_a_test() -> None:
    rows = {row.trap for row in all_rows()} - {None}

    assert rows | set(TRAPS_ELSEWHERE) == set(range(1, 26))
    for place in TRAPS_ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name}(" in (Path(__file__).parents[1] / path).read_text()


# ── comparing ───────────────────────────────────────────────────────────────────────────────────


def assert_same(plain: Seen, isolated: Seen) -> None:
    before, after = (
        json.dumps(seen, indent=1, sort_keys=True, ensure_ascii=False).splitlines()
        for seen in (plain, isolated)
    )
    diff = difflib.unified_diff(before, after, "plain", "isolated", lineterm="", n=12)
    text = "\n".join(diff)
    if text:
        pytest.fail(f"an isolated task differs from a plain one:\n{text}", pytrace=False)


def without(seen: Seen, parts: tuple[str, ...]) -> Seen:
    """What was seen, without the parts of these names, at any depth."""

    def pruned(value: object) -> object:
        if isinstance(value, dict):
            return {key: pruned(one) for key, one in value.items() if key not in parts}
        return [pruned(one) for one in value] if isinstance(value, list) else value

    result = pruned(seen)
    assert isinstance(result, dict)
    return result
