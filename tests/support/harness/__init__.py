"""What the tests stand on: servers, workers, and a check that nothing leaks.

services   a Redis and a RabbitMQ to test with
app        the Celery app of a test, the same in the worker and in pytest
worker     a real `celery worker` as a process of its own
leaks      descriptors, processes and files that a test left behind
marks      finds processes by a mark in their environment; all of the above stand on it

`app` is imported by the workers too, so it imports nothing but Celery.
"""
