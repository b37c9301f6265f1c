"""What stands in more than one place about versions, and the files that only GitHub reads."""

import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import isolated_tasks

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[!c]*.yml"))


def _yaml(path: str) -> dict[Any, Any]:
    loaded = yaml.safe_load((ROOT / path).read_text())
    assert isinstance(loaded, dict)
    return loaded


def _matrix() -> dict[str, list[str]]:
    found = _yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert isinstance(found, dict)
    return found


def _make_variable(name: str) -> list[str]:
    found = re.search(rf"^{name} \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert found
    return found[1].split()


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_workflow_runs_each_python_of_the_classifiers_and_of_the_makefile() -> None:
    prefix = "Programming Language :: Python :: "
    classifiers = metadata("isolated-tasks").get_all("Classifier") or []
    declared = [
        line.removeprefix(prefix)
        for line in classifiers
        if re.fullmatch(rf"{prefix}\d+\.\d+", line)
    ]

    assert _matrix()["python"] == sorted(declared, key=_minor)
    assert [f"python{minor}" for minor in declared] == _make_variable("MATRIX_PYTHONS")


def test_the_workflow_runs_the_lowest_and_the_newest_celery_of_the_makefile() -> None:
    celeries = _make_variable("MATRIX_CELERIES")

    assert _matrix()["celery"] == [celeries[0], celeries[-1]]
    floors = metadata("isolated-tasks").get_all("Requires-Dist") or []
    assert f"celery>={celeries[0].removesuffix('.0')}" in floors


def test_the_lowest_python_is_the_one_that_is_asked_for() -> None:
    assert metadata("isolated-tasks")["Requires-Python"] == f">={_matrix()['python'][0]}"


def test_the_workflow_calls_targets_that_the_makefile_has() -> None:
    jobs = _yaml(".github/workflows/ci.yml")["jobs"]
    called = [
        target
        for job in jobs.values()
        for step in job["steps"]
        for target in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))
    ]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)

    assert {"test", "docs", "dist"} <= set(called)
    assert set(called) <= set(targets)


def test_the_workflow_has_the_servers_that_the_tests_want() -> None:
    services = _yaml(".github/workflows/ci.yml")["jobs"]["test"]["services"]

    assert set(services) == {"redis", "rabbitmq", "postgres"}


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.dependabot", [ROOT / ".github/dependabot.yml"]),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
    ],
)
def test_what_github_reads_has_the_form_that_github_wants(schema: str, paths: list[Path]) -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    checked = subprocess.run([*checker, *map(str, paths)], capture_output=True, text=True)

    assert paths
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_addresses_of_the_repository_are_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    source = re.search(r'^Source = "https://github\.com/([^"]+)"$', project, re.M)
    assert source
    files = [ROOT / "CHANGELOG.md", *ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")]
    texts = [project, *(path.read_text() for path in files)]

    named = {
        name
        for text in texts
        for name in re.findall(r"https://(?:raw\.githubusercontent|github)\.com/([\w-]+/\w+)", text)
    }
    assert named == {source[1]}


def test_the_version_stands_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text()

    assert isolated_tasks.__version__ not in re.findall(r'^version = "(.*)"$', project, re.M)
    assert 'path = "isolated_tasks/__init__.py"' in project


@pytest.mark.skipif(
    os.environ.get("GITHUB_REF_TYPE") != "tag", reason="only where a tag is to be released"
)
def test_a_tag_is_the_version_with_a_date_and_the_addresses_are_of_its_repository() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    here = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}".format_map(os.environ)
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert os.environ["GITHUB_REF_NAME"] == f"v{isolated_tasks.__version__}"
    assert f'\nSource = "{here}"\n' in project
    assert re.search(rf"^## \[{isolated_tasks.__version__}\] - \d{{4}}-", changelog, re.M)
