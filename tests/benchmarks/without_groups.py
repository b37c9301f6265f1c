"""Preloaded by a forkserver, this has memory limits kept by looking alone."""

from typing import NoReturn

from isolated_tasks.process import cgroup


def find() -> NoReturn:
    """Find no place for control groups."""
    raise cgroup.NoPlaceError("switched off")


cgroup.Delegation.find = find  # type: ignore[method-assign]
