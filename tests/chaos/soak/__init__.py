"""The chaos soak: mixed calls on real brokers while processes are killed and stopped at random.

``make soak`` runs it for an hour, tests/chaos/test_soak.py for a minute.

run        one soak: starts, load and chaos, rests, the end
accounts   what the ledger says about each call; what must not be, counted
report     the table and the JSON
monkey     kills and stops processes, starts workers again
orphans    what lives on after the end of what it belonged to
growth     descriptors, memory and files at rest
load       sends calls, and knows when they have ended
members    the workers and their processes
app        the Celery app of the workers
kinds      what calls there are, and what may become of them
ledger     a file to which every process appends what it does

What is random is drawn from the seed: the calls, the victims, the times. What comes of it is up
to the machine, so the same seed gives the same attack and not the same run.
"""
