"""The tree of errors, and that each of them travels whole."""

import inspect
import json
import pickle
import re
from typing import Any

import billiard.exceptions
import celery.exceptions
import cloudpickle
import pytest
from celery import Celery

from isolated_tasks import errors
from isolated_tasks.errors import IsolationError, OutOfMemoryError

CLASSES: list[type[IsolationError]] = [getattr(errors, name) for name in errors.__all__]


def full(cls: type[IsolationError]) -> IsolationError:
    """An error with a value for each of its fields."""
    return cls("it happened", {field: f"value of {field}" for field in cls.fields})


def through_json(error: IsolationError) -> Any:
    """As a result backend of Celery takes an exception apart and rebuilds it."""
    app = Celery("errors", backend="cache+memory://", set_as_current=False)
    kept = app.backend.prepare_exception(error, serializer="json")
    return app.backend.exception_to_python(json.loads(json.dumps(kept)))


def contents(error: IsolationError) -> tuple[object, ...]:
    return (type(error), str(error), *(getattr(error, field) for field in error.fields))


# ── the tree ────────────────────────────────────────────────────────────────────────────────────


def test_the_tree_is_that_of_the_docstring() -> None:
    drawn = re.findall(r"^    (?:[│├└─ ]*)(\w+)  +\S", errors.__doc__ or "", re.MULTILINE)
    below_root = [cls.__name__ for cls in CLASSES if cls is not IsolationError]

    assert drawn[0] == "IsolationError"
    assert sorted(drawn[1:]) == sorted(below_root)
    assert {cls.__bases__[0] for cls in CLASSES} == {Exception, IsolationError, OutOfMemoryError}
    assert IsolationError.__bases__ == (Exception,)


def test_a_second_base_is_one_that_the_docstring_names() -> None:
    drawn = re.findall(r"(\w+Error) .*\(a (\w+)\)$", errors.__doc__ or "", re.MULTILINE)
    have = [
        (cls.__name__, base.__name__)
        for cls in CLASSES
        for base in cls.__bases__
        if base not in (IsolationError, OutOfMemoryError, Exception, errors._EndedChild)
    ]

    assert have == drawn == [("OptionError", "ValueError")]


def test_every_class_of_the_module_is_exported_and_has_a_docstring() -> None:
    defined = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__ and name[0] != "_"
    ]

    assert sorted(errors.__all__) == sorted(defined)
    assert all(cls.__dict__.get("__doc__") for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "taken_for_more",
    [
        MemoryError,
        SystemExit,
        billiard.exceptions.WorkerLostError,
        billiard.exceptions.Terminated,
        billiard.exceptions.TimeLimitExceeded,
        billiard.exceptions.SoftTimeLimitExceeded,
        celery.exceptions.WorkerLostError,
        celery.exceptions.Ignore,
        celery.exceptions.Reject,
        celery.exceptions.Retry,
    ],
)
def test_none_is_one_that_celery_treats_specially(
    cls: type[IsolationError], taken_for_more: type[BaseException]
) -> None:
    assert not issubclass(cls, taken_for_more)


# ── one error ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cls", CLASSES)
def test_the_data_are_attributes_and_the_message_is_the_text(cls: type[IsolationError]) -> None:
    error = full(cls)

    assert str(error) == "it happened"
    assert [getattr(error, field) for field in cls.fields] == [f"value of {f}" for f in cls.fields]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_described(cls: type[IsolationError]) -> None:
    described = [inspect.get_annotations(one) for one in (cls, errors._EndedChild)]

    assert set(cls.fields) <= set().union(*described)
    assert set(described[1]) <= set(cls.fields) or not issubclass(cls, errors._EndedChild)


@pytest.mark.parametrize("cls", CLASSES)
def test_missing_data_are_none(cls: type[IsolationError]) -> None:
    error = cls("it happened")

    assert error.args == ("it happened",)
    assert [getattr(error, field) for field in cls.fields] == [None] * len(cls.fields)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_without_anything_can_be_made(cls: type[IsolationError]) -> None:
    # Celery does, where a result holds no more than the name of the exception.
    assert str(cls()) == ""


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_arrives_whole_through_pickle(cls: type[IsolationError], dumps: type) -> None:
    error = full(cls)
    error.extra = "set later"  # type: ignore[attr-defined]

    loaded = pickle.loads(dumps(error))

    assert contents(loaded) == contents(error)
    assert loaded.args == error.args
    assert loaded.extra == "set later"


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_arrives_whole_through_celery_s_json(cls: type[IsolationError]) -> None:
    error = full(cls)

    assert contents(through_json(error)) == contents(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_can_be_rebuilt_from_its_args(cls: type[IsolationError]) -> None:
    error = full(cls)

    assert contents(cls(*error.args)) == contents(error)


def test_the_data_are_copied() -> None:
    data = {"address": "/tmp/x"}
    error = errors.ForkserverError("gone", data)

    data["address"] = "elsewhere"

    assert error.args[1] == {"address": "/tmp/x"}


def test_an_option_error_is_a_value_error() -> None:
    assert isinstance(full(errors.OptionError), ValueError)
