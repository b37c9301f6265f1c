"""What the contract suite is made of.

table        a row, and the tasks that rows send; all that a module of rows needs
recorder     in the worker: writes down every signal, hook and note
app          the app that the worker runs
features     what this Celery does, where its versions differ
side         one worker that all rows are sent to, plain or isolated
observation  what a side has shown, without what differs from run to run

`app`, `table` and `recorder` are imported by the workers too, so they import nothing but Celery.
"""
