"""What the project promises about itself."""

import re
from importlib.metadata import requires, version
from pathlib import Path

import isolated_tasks

ROOT = Path(__file__).parent.parent.parent


def test_the_runtime_dependencies_are_these_four() -> None:
    always = [line for line in requires("isolated-tasks") or [] if "extra ==" not in line]

    assert {re.split(r"[^\w-]", line)[0] for line in always} == {
        "billiard",
        "celery",
        "cloudpickle",
        "psutil",
    }


def test_each_runtime_dependency_has_a_floor_and_no_ceiling() -> None:
    always = [line for line in requires("isolated-tasks") or [] if "extra ==" not in line]

    assert [line for line in always if not re.fullmatch(r"\w+>=[\d.]+", line)] == []


def test_the_version_is_the_package_s_own() -> None:
    assert version("isolated-tasks") == isolated_tasks.__version__


def test_the_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert f"\n## [{isolated_tasks.__version__}] - " in changelog


def test_the_installed_package_is_tested_and_not_the_sources() -> None:
    assert not Path(isolated_tasks.__file__).is_relative_to(ROOT / "isolated_tasks")


def test_the_installed_package_has_its_type_marker_and_no_tests() -> None:
    folder = Path(isolated_tasks.__file__).parent

    assert (folder / "py.typed").is_file()
    assert not (folder.parent / "tests").exists()
