"""Run any callable in a short-lived child; nothing in here knows of Celery.

Imports point down this list only (a test says so)::

    launcher    role: main process; starts, watches and stops forkservers
    children    the children of one requesting process: running, idle, exiting
    supervisor  role: requester; starts one child, sends it calls, waits for it
    forkserver  role: forkserver; starts, signals and reaps children
    child       role: child; runs calls, sends outcomes, exits
    preload     what a forkserver loads, and what that left behind
    randomness  random numbers that differ from child to child
    outcome     a result or a failure, and how an exception crosses processes
    pickling    values become bytes and buffers; the path to what will not
    transport   sockets that carry messages, buffers and descriptors
    protocol    every message and how it becomes bytes; no I/O
    lifecycle   the life of one child as a table
    options     what one process is asked for, validated once
    usage       what it used
    system      the only module that knows which kernel this is
"""
