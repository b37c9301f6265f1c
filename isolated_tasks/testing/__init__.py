"""For the tests of projects: a worker that isolates, a switch that does not, a check for growth.

`start_worker` runs an embedded worker whose isolated tasks really run in a child. `in_place` has
them run where they are called. `assert_no_growth` fails if the calls of a task leave more memory
behind than they may. None of it needs pytest; its fixtures are in `isolated_tasks.testing.plugin`,
which pytest finds by itself.

Names are loaded on first use (PEP 562): pytest imports this package in every project that has it
installed beside, and must not import Celery for that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isolated_tasks.testing.embedded import in_place, start_worker
    from isolated_tasks.testing.growth import Growth, assert_no_growth, measure_growth

__all__ = ["Growth", "assert_no_growth", "in_place", "measure_growth", "start_worker"]

_MODULE_OF = {"in_place": "embedded", "start_worker": "embedded"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'growth')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
