"""Both sides of one pool over one broker, when all is over."""

from collections.abc import Sequence
from functools import cached_property

from contract import observation
from contract.side import Side
from contract.table import Row, Seen


class Running:
    """What both sides have shown.

    Args:
        plain_side: the side whose tasks are plain.
        isolated_side: the other.
        rows: what both were sent.
    """

    def __init__(self, plain_side: Side, isolated_side: Side, rows: Sequence[Row]) -> None:
        self.sides = (plain_side, isolated_side)
        self.rows = rows

    @cached_property
    def plain(self) -> dict[str, Seen]:
        """By the name of a row."""
        return observation.observe(self.sides[0], self.rows)

    @cached_property
    def isolated(self) -> dict[str, Seen]:
        """By the name of a row."""
        return observation.observe(self.sides[1], self.rows)


def run(plain: Side, isolated: Side, rows: Sequence[Row]) -> Running:
    """Have both workers do what the rows say, and stop them."""
    sides = (plain, isolated)
    for side in sides:
        side.wait_until_ready()
    for side in sides:
        side.send(rows)
    for side in sides:
        side.follow(rows)
    for side in sides:
        side.settle()
    for side in sides:
        side.look(rows)
    for side in sides:
        side.stop()
    return Running(plain, isolated, rows)
