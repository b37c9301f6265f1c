"""The app that the workers of the suite run."""

import os

from contract import recorder, table
from harness.app import Settings

recorder.start(os.environ["CONTRACT_RECORD"])

app = table.make_contract_app(
    __name__, Settings.from_environ(), task_cls=os.environ["CONTRACT_TASK_CLS"], current=True
)
