"""What the workers import."""

from typing import Any

from fork_safety import uses
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask, time_limit=20)
def tell(library: str) -> dict[str, Any]:
    return uses.tell(library)


@app.task(base=IsolatedTask, time_limit=40, start_method="spawn")
def tell_spawned(library: str) -> dict[str, Any]:
    return uses.tell(library)
