"""The board: what a child writes there, and whatever else may be there."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from harness.frames import SAMPLES
from isolated_tasks.process import board
from isolated_tasks.process.board import MAX_ID_BYTES, Board, Entry
from isolated_tasks.process.protocol import Spawn

(ONE_CALL,) = (message for message in SAMPLES if isinstance(message, Spawn))
BATCH = dataclasses.replace(ONE_CALL, batch_size=3, call_id="first/1")
SPARE = dataclasses.replace(ONE_CALL, call_id=None)


@pytest.fixture(autouse=True)
def _no_place_of_our_own() -> Iterator[None]:
    yield
    board.adopt(None)


def entered(spawn: Spawn, *, on: Board | None = None) -> Entry:
    """The entry of a child that this process is from now on."""
    entry = (on or Board()).enter(spawn)
    board.adopt(entry.place)
    return entry


def told(entry: Entry) -> tuple[Any, ...]:
    said = entry.describe(pid=12)
    return said["state"], said["position"], said["call"]


def test_a_batch_from_call_to_call() -> None:
    entry = entered(BATCH)
    seen = [told(entry)]
    for position in (1, 2, 3):
        board.begin(position)
        seen.append(told(entry))
        board.name_call(f"id {position}")
        seen.append(told(entry))
        board.end()
        seen.append(told(entry))

    assert seen == [
        ("starting", 0, None),
        ("running", 1, None),
        ("running", 1, "id 1"),
        ("idle", 1, None),
        ("running", 2, None),
        ("running", 2, "id 2"),
        ("idle", 2, None),
        ("running", 3, None),
        ("running", 3, "id 3"),
        ("exiting", 3, None),
    ]


def test_a_spare_is_one_until_it_has_a_call() -> None:
    entry = entered(SPARE)
    assert told(entry) == ("spare", 0, None)
    board.begin(1)
    assert told(entry) == ("running", 1, None)


def test_what_is_said_is_json_and_has_what_was_asked_for() -> None:
    entry = entered(ONE_CALL)
    board.begin(1)

    said = json.loads(json.dumps(entry.describe(pid=12), allow_nan=False))

    assert (said["pid"], said["name"], said["batch_size"]) == (12, "tasks.render", 1)
    assert (said["call_id"], said["memory_limit_bytes"]) == ("id", 1 << 30)
    assert 0 <= said["call_seconds"] <= said["seconds"]


def test_an_id_that_is_too_long_is_not_told_in_part() -> None:
    entry = entered(BATCH)
    board.begin(1)
    board.name_call("ü" * (MAX_ID_BYTES // 2))
    assert told(entry)[2] == "ü" * (MAX_ID_BYTES // 2)
    board.begin(2)
    board.name_call("x" * (MAX_ID_BYTES + 1))
    assert told(entry)[2] is None


def test_what_no_byte_can_be_is_told_all_the_same() -> None:
    entry = entered(BATCH)
    board.begin(1)
    board.name_call("\udc80")
    assert told(entry)[2] == "?"


def test_whatever_a_body_has_written_there_is_told_as_json() -> None:
    for seed in range(256):
        entry = entered(BATCH)
        assert entry.place is not None
        memory, at = entry.place.memory, entry.place.at
        memory[at : at + 160] = bytes([seed]) * 80 + os.urandom(80)

        json.dumps(entry.describe(pid=12), allow_nan=False)


def test_a_place_is_used_again_and_says_nothing_of_its_last_child() -> None:
    on = Board(places=2)
    first, second = entered(BATCH, on=on), on.enter(BATCH)
    board.adopt(first.place)
    board.begin(2)
    board.name_call("id")
    assert told(second) == ("starting", 0, None)

    # There is none left; then nothing is known.
    third = on.enter(BATCH)
    assert told(third) == (None, None, None)
    on.leave(third)
    on.leave(first)

    assert told(on.enter(BATCH)) == ("starting", 0, None)
    assert told(on.enter(BATCH)) == (None, None, None)


def test_without_a_place_nothing_is_written_and_nothing_is_known() -> None:
    entry = entered(dataclasses.replace(ONE_CALL, start_method="spawn"))

    board.begin(1)
    board.name_call("id")
    board.end()

    assert told(entry) == (None, None, None)
