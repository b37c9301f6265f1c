"""No fault is without a test, also in a spawned child, and from each kind of slot."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness.faults import FAULTS, Fault, Marked, read

TESTS = Path(__file__).parents[1]


#: Tests that bear a number, each with another mark.
MARKED = """
import pytest
pytestmark = pytest.mark.fault(1)
def test_plain(): pass
@pytest.mark.skip(reason="it is")
def test_skipped(): pass
@pytest.mark.skipif(True, reason="it is")
def test_skipped_here(): pass
@pytest.mark.skipif(False, reason="it is not")
def test_skipped_elsewhere(): pass
@pytest.mark.xfail(reason="nobody has mended it")
def test_expected_to_fail(): pass
"""


def collect(folder: Path) -> list[Marked]:
    """All tests that say which fault they are about, as pytest collects them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "harness.faults"]
    with tempfile.TemporaryDirectory() as outputs:
        path = Path(outputs) / "marked"
        subprocess.run(
            [*command, f"--faults-to={path}", str(folder)],
            cwd=TESTS.parent,
            env={**os.environ, "PYTHONPATH": str(TESTS / "support")},
            stdout=subprocess.DEVNULL,
            # A file that cannot be collected is its own failure.
            check=False,
        )
        return read(path)


@pytest.fixture(scope="module")
def marked() -> list[Marked]:
    return collect(TESTS)


def test_the_faults_have_the_numbers_from_1_to_52() -> None:
    numbers = [fault.number for faults in FAULTS.values() for fault in faults]

    assert numbers == list(range(1, 53))


def test_no_test_bears_a_number_twice(marked: list[Marked]) -> None:
    assert [test.name for test in marked if len(set(test.numbers)) < len(test.numbers)] == []


def test_each_fault_has_tests_that_are_run_and_have_to_pass(marked: list[Marked]) -> None:
    tried = {number for test in marked if test.counts for number in test.numbers}

    assert sorted(tried) == list(range(1, 53))


@pytest.mark.parametrize(
    "fault",
    [fault for faults in FAULTS.values() for fault in faults],
    ids=lambda fault: fault.number,
)
def test_each_fault_is_tried_wherever_it_could_make_a_difference(
    marked: list[Marked], fault: Fault
) -> None:
    tests = [test for test in marked if test.counts and fault.number in test.numbers]

    tried_with = {start_method for test in tests for start_method in test.start_methods}
    tried_in = {slot for test in tests for slot in test.slots}
    assert set(fault.start_methods) - tried_with == set()
    assert set(fault.slots) - tried_in == set()


def test_what_is_skipped_or_expected_to_fail_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(MARKED)

    counted = [test.name.partition("::")[2] for test in collect(tmp_path) if test.counts]

    assert counted == ["test_plain", "test_skipped_elsewhere"]
