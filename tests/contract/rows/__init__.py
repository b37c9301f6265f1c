"""The table: one module for each area, found by itself; each has its tasks and its `ROWS`.

A row is something that a task may do or a caller may see. All rows run in a worker whose tasks are
plain, and in one whose tasks are isolated, at the same time; then the two observations of each row
are compared in all parts: results, signals, hooks, events, log, and what the bodies noted
(`contract.observation` lists them). To add rows, add to a module here, or add a module:

    from celery import Task
    from contract.recorder import note
    from contract.table import Row, task

    @task(bind=True, max_retries=2)          # the options of @app.task
    def stubborn(self: Task) -> int:
        note(self.request.retries)           # compared; shows where and how often a body ran
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return self.request.retries

    ROWS = [
        Row(
            "a task that retries succeeds in the end",
            lambda app: stubborn.on(app).delay(),
            expects={"state": "SUCCESS", "result": 2, "runs": 3},
        ),
    ]

* A row says what it expects of the plain side (see `contract.observation.check`), so that one in
  which nothing happens fails.
* `send` runs in the client and does not wait. What has to wait goes into `follow` (while the
  workers run) or `look` (when all tasks have ended).
* No body waits for another task or for time: the pools have few slots, and solo has one. Retry
  with ``countdown=0``.
* Give the tasks of one row different arguments: they are told apart by name and arguments.
* Ids, pids, times and addresses are replaced by symbols. What else differs from run to run, a body
  must not report; `scrub` is for text that it has no hand in.
* What a body logs by a logger that does not know the task must mention the task's id, or it cannot
  be found.
* A body reaches its other tasks by ``other.on(self.app)``.
"""
