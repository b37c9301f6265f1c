"""The parts of `compare_rss.py`, which is the command to run.

Imports point down this list only:

    comparison    the four runs, one after the other, and what is written at the end
    display       the live table, or lines
    plot          PNG and SVG
    measure       one run: a worker started, its tasks sent, its process tree sampled
    figures       what one run measured
    app           what the workers import: the Celery app and its task, and its command line
    workload      the data file and the task's body
    options       the command line

What the examples share is in `support`.
"""
