"""A program that starts a worker by itself, without the `celery` command, and has it audited."""

import sys

from harness.app import make_app
from isolated_tasks import audit

app = make_app("program")


@app.task(name="program.add")
def add(x: int, y: int) -> int:
    return x + y


if __name__ == "__main__":
    audit.install(app)
    name = sys.argv[sys.argv.index("-n") + 1]
    app.Worker(hostname=name, pool_cls="solo", loglevel="INFO", memory_audit=True).start()
