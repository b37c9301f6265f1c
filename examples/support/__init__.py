"""What the examples share, so that each of them can be read from top to bottom.

Imports point down this list only:

    program       the command: its options, its errors and its exit code, where its files go
    plot          the look of the plots
    lab           a folder, a connection, and workers that are measured
    worker        one `celery worker`: started, watched, stopped with all that it started
    memory        what a process tree holds
    connection    the broker and the result backend, for the command and for its workers
    files         messages as files, where no broker is given
    interruption  signals
    errors        what can end an example early
"""
