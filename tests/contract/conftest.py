"""Each row of the table, in a plain and in an isolated worker."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from contract.running import Running, run
from contract.side import Side
from contract.table import all_rows
from harness.worker import pool_arguments
from harness.workplace import Workplace

#: Where the workers find the modules of this suite.
HERE = Path(__file__).parent

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
    if combination not in runs:
        rows = [row for row in all_rows() if row.runs_in(pool, broker)]
        try:
            with ExitStack() as cleanup:

                def side(name: str) -> Side:
                    workplace = Workplace(request, tmp_path_factory.mktemp(name), apps=HERE)
                    cleanup.callback(workplace.close)
                    return Side(name, pool=pool, broker=broker, workplace=workplace)

                runs[combination] = run(side("plain"), side("isolated"), rows)
        except Exception as exc:
            runs[combination] = exc
    done = runs[combination]
    if isinstance(done, Exception):
        raise done  # once for each row, and not run again for each
    return done
