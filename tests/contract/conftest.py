"""Each row of the table, in a plain and in an isolated worker."""

from collections.abc import Callable

import pytest

from contract.running import Running, run
from contract.side import Side
from contract.table import all_rows
from harness.worker import pool_arguments

#: By pool and broker. Not a fixture's parameter: pytest would group by the row as well.
Runs = dict[tuple[str, str], Running | Exception]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """What has been run so far."""
    return {}


@pytest.fixture
def running(
    request: pytest.FixtureRequest,
    runs: Runs,
    combination: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Running:
    """Both workers of the pool and the broker that the test's parameter names, all rows done."""
    pool, broker = combination
    pool_arguments(pool)  # skips before anything is started
    service: Callable[[str], str] = request.getfixturevalue
    if combination not in runs:
        plain, isolated = (
            Side(
                name,
                pool=pool,
                broker=broker,
                broker_url=service(f"{broker}_url"),
                redis_url=service("redis_url"),
                folder=tmp_path_factory.mktemp(name),
            )
            for name in ("plain", "isolated")
        )
        rows = [row for row in all_rows() if row.runs_in(pool, broker)]
        try:
            runs[combination] = run(plain, isolated, rows)
        except Exception as exc:
            runs[combination] = exc
    done = runs[combination]
    if isinstance(done, Exception):
        raise done  # once for each row, and not run again for each
    return done
