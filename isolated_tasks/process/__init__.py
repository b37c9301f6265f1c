"""Run any callable in a short-lived child; nothing in here knows of Celery.

Imports point down this list only (a test says so)::

    overview     what runs in all forkservers of a main process, for who asks
    launcher     role: main process; starts, watches, replaces and stops forkservers
    generation   one forkserver, from its start to its end
    children     the children of one requesting process: running, idle, exiting
    supervisor   role: requester; starts one child, sends it calls, waits for it
    enforcer     what is done to a body from outside, and when: clocks, memory, stop ladder
    verdicts     what a call that has no outcome has failed with
    stopping     the stop ladder
    forkserver   role: forkserver; starts, signals and reaps children
    strays       processes that children have left behind
    wear         when it is time for another forkserver
    breaker      how soon another child is worth a try
    admission    which children may start: those whose memory limits fit into a budget
    child        role: child; runs calls, sends outcomes, exits
    limits       what a body is bound by inside its process: signals, resource limits
    condition    what a body may leave changed for the next call of its batch
    preload      what a forkserver loads, and what that left behind
    randomness   random numbers that differ from child to child
    stderr       what a body writes there: passed on, and the last of it kept
    plain        an outcome as plain data, for who unpickles nothing that a body sends
    outcome      a result or a failure, and how an exception crosses processes
    pickling     values become bytes and buffers; the path to what will not
    board        what each child does just now, for who asks
    transport    sockets that carry messages, buffers and descriptors
    protocol     every message and how it becomes bytes; no I/O
    lifecycle    the life of one child as a table
    options      what one process, and what one call, is asked for, validated once
    usage        what it used
    cgroup       a control group for each child, in which the kernel holds its memory limit
    memory       how much memory processes hold, how much there is, when it ran out
    descendants  who they are, and their end
    system       the only module that knows which kernel this is
"""
