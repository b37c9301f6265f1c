"""The chaos soak, for a minute. The hour is ``make soak``."""

import os
import random
from pathlib import Path

import pytest

from harness.services import ServiceMissing, require
from soak.run import Options, run

#: Another one each time; the message of a failure says which it was.
SEED = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))


# A minute where nothing else runs; each phase has a limit of its own.
@pytest.mark.timeout(300)
@pytest.mark.fault(51)
def test_no_promise_is_broken_while_processes_are_killed_and_stopped(tmp_path: Path) -> None:
    try:
        report = run(Options(seed=SEED, seconds=20.0, rate=12.0), tmp_path)
    except ServiceMissing as missing:
        require(missing)

    again = f"again with SOAK_SEED={SEED}; the ledger and the logs are in {tmp_path}"
    assert report.is_good, "\n".join([again, *report.lines(), *report.details()])
    # There was something to survive.
    assert sum(report.attacks.values()) > 10
    assert sum(report.accounts.ends.values()) > 100
