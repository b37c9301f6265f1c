"""Imports point down only, and the process wing is free of Celery."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import isolated_tasks
from isolated_tasks import process

PACKAGE = Path(isolated_tasks.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
WING = "isolated_tasks.process"
WITHOUT_MAP = ("isolated_tasks.commands", "isolated_tasks.testing")


def drawn(docstring: str | None) -> list[str]:
    """The modules of a map, top first."""
    return re.findall(r"^    (\w+)/? {2,}\S", docstring or "", re.MULTILINE)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a module imports when it runs, at its top or in a function."""
    for node in ast.walk(_Runtime().visit(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.startswith("isolated_tasks")
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").startswith("isolated_tasks"):
                yield from (_module(node.module or "", alias.name) for alias in node.names)


class _Runtime(ast.NodeTransformer):
    """Leaves out what is only there for type checkers, and what only `python -m` runs."""

    def visit_If(self, node: ast.If) -> ast.AST:
        test = ast.unparse(node.test)
        if test == "TYPE_CHECKING" or test.startswith("__name__"):
            return ast.Module(body=node.orelse, type_ignores=[])
        return self.generic_visit(node)


def _module(package: str, name: str) -> str:
    """What ``from package import name`` imports: a module, or a name of one."""
    full = f"{package}.{name}"
    return full if importlib.util.find_spec(package) and _is_module(full) else package


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


OUTER = drawn(isolated_tasks.__doc__)
INNER = drawn(process.__doc__)


def height(module: str) -> tuple[int, int]:
    """How far up a module stands in the two maps; the package itself is no layer."""
    parts = module.split(".")[1:]
    outer = len(OUTER) - OUTER.index(parts[0])
    inner = len(INNER) - INNER.index(parts[1]) if parts[0] == "process" and parts[1:] else 0
    return outer, inner


# ── the maps ────────────────────────────────────────────────────────────────────────────────────


def test_the_maps_have_every_module_once() -> None:
    outer = {name_of(path).split(".")[1] for path in MODULES if name_of(path) != "isolated_tasks"}
    inner = {
        name_of(path).split(".")[2] for path in MODULES if name_of(path).startswith(WING + ".")
    }

    assert sorted(OUTER) == sorted(outer)
    assert sorted(INNER) == sorted(inner)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    module = name_of(path)
    if module in ("isolated_tasks", WING):
        # Nothing but maps and lazy names.
        assert list(imported(path)) == []
        return
    # These have no map of their own.
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    beside = f"{package}." if package in WITHOUT_MAP else "nothing"
    others = [other for other in imported(path) if not other.startswith(beside)]
    up = [other for other in others if height(other) >= height(module)]

    assert up == []


# ── a fresh interpreter ─────────────────────────────────────────────────────────────────────────


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh interpreter has after it has imported these."""
    statement = (
        f"import {', '.join(modules)}, sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    )
    # The current directory comes first in its sys.path: it has to be where we found the package.
    run = subprocess.run(
        [sys.executable, "-c", statement],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return set(run.stdout.split())


def test_the_process_wing_imports_nothing_of_celery() -> None:
    packages = loaded_by(*(f"{WING}.{name}" for name in INNER), "isolated_tasks.errors")

    assert packages & {"celery", "billiard", "kombu", "vine", "amqp"} == set()
    assert "cloudpickle" in packages


def test_the_package_itself_imports_nothing_but_itself() -> None:
    packages = loaded_by("isolated_tasks")

    assert packages & {"celery", "billiard", "kombu", "cloudpickle", "psutil"} == set()


def test_only_system_knows_which_kernel_this_is() -> None:
    guilty = [
        name_of(path)
        for path in MODULES
        if path.stem != "system"
        and re.search(r"sys\.platform|platform\.system|uname", path.read_text())
    ]

    assert guilty == []
