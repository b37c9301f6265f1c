"""The parts of `compare_rss.py`, which is the command to run.

Imports point down this list only:

    comparison    the four runs, one after the other, and what is written at the end
    display       the live table, or lines
    plot          PNG and SVG
    measure       one run: a worker started, its tasks sent, its process tree sampled
    worker        one `celery worker`: started, watched, stopped with all that it started
    figures       what one run measured
    app           what the workers import: the Celery app and its task
    connection    the broker and the result backend, for both sides
    workload      the data file and the task's body
    options       the command line
    interruption  signals
    errors        what can end a comparison early
"""
