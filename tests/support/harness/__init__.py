"""What the tests stand on: servers, workers, and a check that nothing leaks.

services          a Redis and a RabbitMQ to test with
app               the Celery app of a test, the same in the worker and in pytest
worker            a real `celery worker` as a process of its own
workplace         the workers of one test, under one name, and what they leave behind
combination       a worker that several tests share, and that has to be as before after each
fixtures          those of tests with real workers, for a conftest.py to import
processes         slots without a worker, and other processes that tests have to do with
process_fixtures  those of tests with real children, for a conftest.py to import
faults            the faults to survive, which tests name by number
faulty            bodies that do what nobody should
caller, cut_short, foreign, greenlets   programs that call in trying circumstances
families          programs that start processes of their own
killing           kills a process before any step that a test wants
frames            inputs for a reader of frames, right and wrong, and what has to come of them
machines          any message, and how hypothesis runs state machines
leaks             what a test left behind: descriptors, processes, zombies, files, shared memory
page              runs the code blocks of a page of the docs
marks             finds processes by a mark in their environment; all of the above stand on it

`app` is imported by the workers too, so it imports nothing but Celery.
"""
