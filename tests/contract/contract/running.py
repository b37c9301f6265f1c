"""Both sides of one pool over one broker, from the start to what they have shown."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from contract import observation
from contract.side import Side
from contract.table import Row, Seen


@dataclass(frozen=True)
class Shown:
    """What one side has shown.

    Args:
        rows: by the name of a row.
        other_log: what the worker has logged, from WARNING on, that is about no task.
        unsettled: what there was still to do, after long enough.
        exit_code: of the worker.
        killed: whether it had to be killed.
        leaked: one line for each process that it left behind.
        log: all that it has logged.
        elsewhere: how many notes were made in a process other than their task's slot.
    """

    rows: dict[str, Seen]
    other_log: list[str]
    unsettled: str
    exit_code: int | None
    killed: bool
    leaked: list[str]
    log: str
    elsewhere: int


@dataclass(frozen=True)
class Running:
    """What both sides have shown, when all is over."""

    plain: Shown
    isolated: Shown

    @property
    def sides(self) -> tuple[Shown, Shown]:
        return self.plain, self.isolated


def run(plain: Side, isolated: Side, rows: Sequence[Row]) -> Running:
    """Have both workers do what the rows say, and stop them."""
    sides = (plain, isolated)
    with ExitStack() as cleanup:
        for side in sides:
            cleanup.callback(side.close)
        for side in sides:
            side.start()
        for side in sides:
            side.wait_until_ready()
        for side in sides:
            side.send([row for row in rows if row.plain or side is isolated])
        for side in sides:
            side.follow(rows)
        for side in sides:
            side.settle()
        for side in sides:
            side.look(rows)
        for side in sides:
            side.stop()
        return Running(_shown(plain, rows), _shown(isolated, rows))


def _shown(side: Side, rows: Sequence[Row]) -> Shown:
    return Shown(
        rows=observation.observe(side, [row for row in rows if row.name in side.done]),
        other_log=observation.unattributed(side),
        unsettled=side.unsettled,
        exit_code=side.exit_code,
        killed=side.worker.killed,
        leaked=side.leaked,
        log=side.worker.log(),
        elsewhere=observation.notes_elsewhere(side),
    )
