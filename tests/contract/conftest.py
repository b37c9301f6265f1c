"""Each row of the table, in a plain and in an isolated worker."""

from collections.abc import Iterator

import pytest

from contract.running import Running, run
from contract.side import Side
from contract.table import all_rows
from harness.worker import pool_arguments


class Runs:
    """The pairs of workers, one at a time.

    No fixture of their own: pytest would have one for each row, which is a parameter too.
    """

    def __init__(self, request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> None:
        self._request = request
        self._factory = factory
        self._combination: tuple[str, str] | None = None
        self._running: Running | None = None

    def get(self, pool: str, broker: str) -> Running:
        """Both workers of a pool and a broker, all rows done; the last pair is cleared away."""
        if self._running is None or self._combination != (pool, broker):
            self.close()
            self._running = self._run(pool, broker)
            self._combination = (pool, broker)
        return self._running

    def close(self) -> None:
        if self._running is not None:
            for side in self._running.sides:
                side.close()
            self._running = None

    def _run(self, pool: str, broker: str) -> Running:
        pool_arguments(pool)  # skips before anything is started
        redis_url = self._request.getfixturevalue("redis_url")
        broker_url = redis_url if broker == "redis" else self._request.getfixturevalue("amqp_url")
        sides: list[Side] = []
        try:
            for name in ("plain", "isolated"):
                side = Side(
                    name,
                    pool=pool,
                    broker=broker,
                    broker_url=broker_url,
                    redis_url=redis_url,
                    folder=self._factory.mktemp(name),
                )
                sides.append(side)
            return run(sides[0], sides[1], [row for row in all_rows() if row.runs_in(pool, broker)])
        except BaseException:
            for side in sides:
                side.close()
            raise


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """The pairs of workers of this module."""
    runs = Runs(request, tmp_path_factory)
    yield runs
    runs.close()


@pytest.fixture
def running(runs: Runs, combination: tuple[str, str]) -> Running:
    """Both workers of the pool and the broker that the test's parameter names, all rows done."""
    return runs.get(*combination)
