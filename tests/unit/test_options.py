"""What a process may be asked for, and what not."""

import math
from typing import Any

import pytest

from isolated_tasks.errors import OptionError
from isolated_tasks.process.options import CallOptions, ProcessOptions

NEVER_A_DURATION: list[Any] = [
    0,
    -1,
    0.0,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "5",
    None,
    [],
    1e300,
    1e10,
]

NEVER_AN_ENVIRONMENT: list[Any] = [
    None,
    "A=1",
    ["A"],
    [("A", "1")],
    {"A": 1},
    {"A": None},
    {"A": b"1"},
    {1: "1"},
    {b"A": "1"},
    {"": "1"},
    {"A=B": "1"},
    {"A\0": "1"},
    {"A": "\0"},
    {"A": "\ud800"},
    {"\ud800": "1"},
]

BAD_VALUES: dict[str, list[Any]] = {
    "start_method": ["fork", "", None, 1, "Spawn", [], b"spawn"],
    "batch_size": [0, -1, 1.5, 2.0, "2", None, True, math.inf, 2**63],
    "batch_memory_limit_bytes": [0, -1, 1.5, "1GiB", True, 2**63],
    "memory_limit_bytes": [0, -1, 1.5, "1GiB", True, 2**63],
    "soft_memory_limit_bytes": [0, -1, 1.5, "1GiB", True, 2**63],
    "cpu_time_limit": [0, -1, 1.5, "1", True, 2**63],
    "nice": [-1, 20, 1.5, "1", True],
    "max_open_files": [0, 15, -1, 1.5, "64", True, 2**63],
    "term_grace": NEVER_A_DURATION,
    "batch_idle_timeout": NEVER_A_DURATION,
    "start_timeout": NEVER_A_DURATION,
    "exit_timeout": NEVER_A_DURATION,
    "env": NEVER_AN_ENVIRONMENT,
}

GOOD_VALUES: dict[str, list[Any]] = {
    "start_method": ["forkserver", "spawn"],
    "batch_size": [1, 20, 10**6],
    "batch_memory_limit_bytes": [None, 1, 2**63 - 1],
    "memory_limit_bytes": [None, 1, 2**63 - 1],
    "soft_memory_limit_bytes": [None, 1, 2**63 - 1],
    "cpu_time_limit": [None, 1, 10**6],
    "nice": [None, 0, 19],
    "max_open_files": [None, 16, 10**6],
    "term_grace": [0.001, 1, 5.0, 7 * 24 * 3600],
    "batch_idle_timeout": [0.001, 1, 5.0, 7 * 24 * 3600],
    "start_timeout": [0.001, 1, 5.0, 7 * 24 * 3600],
    "exit_timeout": [0.001, 1, 5.0, 7 * 24 * 3600],
    "env": [{}, {"A": ""}, {"A": "b=c", "Ü": "\udc80"}],
}

BAD = [(option, value) for option, values in BAD_VALUES.items() for value in values]
GOOD = [(option, value) for option, values in GOOD_VALUES.items() for value in values]


@pytest.mark.parametrize(("option", "value"), BAD, ids=repr)
def test_a_bad_value_is_refused_and_task_option_and_value_are_named(
    option: str, value: Any
) -> None:
    with pytest.raises(OptionError) as caught:
        ProcessOptions(**{"name": "tasks.render", option: value})

    error = caught.value
    assert (error.task, error.option, error.value) == ("tasks.render", option, repr(value))
    for part in ("tasks.render", option, repr(value)):
        assert part in str(error)


@pytest.mark.parametrize(("option", "value"), GOOD, ids=repr)
def test_a_good_value_is_kept(option: str, value: Any) -> None:
    options = ProcessOptions(**{"name": "tasks.render", option: value})

    assert getattr(options, option) == value


def test_the_defaults_are_those_of_the_docs() -> None:
    assert ProcessOptions("x") == ProcessOptions(
        name="x",
        start_method="forkserver",
        batch_size=1,
        batch_idle_timeout=5.0,
        batch_memory_limit_bytes=None,
        env={},
        start_timeout=60.0,
        exit_timeout=5.0,
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("name", "y"), ("batch_size", 3), ("env", {"A": "1"}), ("start_method", "spawn")],
)
def test_options_that_differ_in_anything_are_not_equal(option: str, value: Any) -> None:
    # Equal options are what allows two calls to share a batch process.
    assert ProcessOptions("x") != ProcessOptions(**{"name": "x", option: value})


# ── a call ──────────────────────────────────────────────────────────────────────────────────────

NEVER_A_LIMIT = [value for value in NEVER_A_DURATION if value is not None]


@pytest.mark.parametrize("option", ["soft_time_limit", "time_limit"])
@pytest.mark.parametrize("value", NEVER_A_LIMIT, ids=repr)
def test_a_bad_limit_of_a_call_is_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        CallOptions("tasks.render", **{option: value})

    error = caught.value
    assert (error.task, error.option, error.value) == ("tasks.render", option, repr(value))


def test_the_soft_limit_is_not_above_the_hard_one() -> None:
    with pytest.raises(OptionError, match=r"soft_time_limit=3: is above time_limit=2"):
        CallOptions("tasks.render", soft_time_limit=3, time_limit=2)
    with pytest.raises(OptionError, match=r"soft_memory_limit_bytes=3: .*memory_limit_bytes=2"):
        ProcessOptions("tasks.render", soft_memory_limit_bytes=3, memory_limit_bytes=2)


def test_a_clock_runs_for_a_call_that_has_a_time_limit() -> None:
    assert not CallOptions("tasks.render").is_timed
    assert CallOptions("tasks.render", soft_time_limit=1).is_timed
    assert CallOptions("tasks.render", time_limit=1).is_timed
