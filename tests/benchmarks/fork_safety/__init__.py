"""Which libraries may be loaded, or used, in the forkserver: tried with real workers.

    PYTHONPATH=$PWD/tests/support:$PWD/tests/benchmarks python -m fork_safety --write PAGE

It needs a Redis and a PostgreSQL (``--help``). A library that is not installed is left out, with a
word. The table has the versions that were tried.
"""
