"""What is public is there, described, and nothing else."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import isolated_tasks
from isolated_tasks import errors

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(isolated_tasks.__path__, "isolated_tasks.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", isolated_tasks.__all__)
def test_every_exported_name_can_be_imported(name: str) -> None:
    assert getattr(isolated_tasks, name) is not None


@pytest.mark.parametrize("name", [name for name in isolated_tasks.__all__ if name != "__version__"])
def test_every_exported_name_has_a_docstring_of_its_own(name: str) -> None:
    assert vars(getattr(isolated_tasks, name)).get("__doc__")


def test_all_errors_are_exported() -> None:
    assert set(errors.__all__) <= set(isolated_tasks.__all__)
    assert all(getattr(isolated_tasks, name) is getattr(errors, name) for name in errors.__all__)


def test_dir_shows_what_is_exported() -> None:
    assert dir(isolated_tasks) == sorted(isolated_tasks.__all__)


def test_a_star_import_brings_what_is_exported() -> None:
    namespace: dict[str, object] = {}

    exec("from isolated_tasks import *", namespace)

    assert set(namespace) - {"__builtins__"} == set(isolated_tasks.__all__)


def test_another_name_is_an_attribute_error_that_names_both() -> None:
    with pytest.raises(AttributeError, match=r"isolated_tasks.*nonesuch"):
        isolated_tasks.nonesuch  # noqa: B018


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_module_has_a_docstring_and_its_all_is_there(module: ModuleType) -> None:
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_name_without_an_underscore_is_described(module: ModuleType) -> None:
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    methods = {
        f"{name}.{method}": inspect.unwrap(getattr(value, "__func__", value))
        for name, cls in own.items()
        if inspect.isclass(cls)
        for method, value in vars(cls).items()
        if not method.startswith("_") and inspect.isroutine(value)
    }

    assert [name for name, value in {**own, **methods}.items() if not _is_described(value)] == []


def _is_described(value: object) -> bool:
    return not (inspect.isclass(value) or inspect.isroutine(value)) or bool(value.__doc__)
