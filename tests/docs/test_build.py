"""The documentation builds without a warning, names all that is public, and says what code says."""

import subprocess
import sys
from pathlib import Path

import pytest
from celery.utils.dispatch import Signal
from sphinx.util.inventory import InventoryFile

import isolated_tasks
from isolated_tasks import errors, settings, signals, testing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the HTML."""
    folder = tmp_path_factory.mktemp("docs")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(folder / "html")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


def _exported() -> list[type]:
    modules = [isolated_tasks, testing]
    values = [getattr(module, name) for module in modules for name in module.__all__]
    return [value for value in values if isinstance(value, type)]


def test_the_documentation_builds_without_a_warning(built: Path) -> None:
    assert (built / "index.html").is_file()


def test_what_is_public_is_in_the_reference_and_nothing_else(built: Path) -> None:
    public = {f"isolated_tasks.{name}" for name in isolated_tasks.__all__}
    # All errors are exported, and described where Celery's results say that they are.
    public -= {f"isolated_tasks.{name}" for name in errors.__all__}
    public |= {f"isolated_tasks.errors.{name}" for name in errors.__all__}
    public |= {f"isolated_tasks.signals.{name}" for name in signals.__all__}
    public |= {"isolated_tasks.audit.install", "isolated_tasks.prometheus.register"}
    public |= {f"isolated_tasks.testing.{name}" for name in testing.__all__}

    inventory = InventoryFile.loads((built / "objects.inv").read_bytes(), uri="").data
    described = {
        name
        for kind in ("class", "exception", "function", "data")
        for name in inventory.get(f"py:{kind}", {})
    }
    # Sphinx notes too where a name is at home that is described where it is exported.
    homes = {f"{one.__module__}.{one.__qualname__}" for one in _exported()}
    assert described - (homes - public) == public


def test_signals_that_are_there_are_public() -> None:
    made = {name for name, value in vars(signals).items() if type(value) is Signal}

    assert made == set(signals.__all__)


def test_each_option_has_its_default_in_its_description() -> None:
    sys.path.insert(0, str(ROOT / "docs/extensions"))
    try:
        import from_code
    finally:
        sys.path.pop(0)
    words = from_code.comments("isolated_tasks.task", "IsolatedMixin")

    assert [name for name in settings.TASK_OPTIONS if "Default: " not in words[name]] == []
    told = {name: words[name].split("Default: ")[1] for name in settings.TASK_OPTIONS}
    for name, value in settings.TASK_OPTIONS.items():
        if name == "max_result_bytes":
            assert told[name] == f"{from_code.size(value)}."
        elif name == "isolated":
            assert f"else {value}" in told[name]
        elif value is not None:
            text = f'"{value}"' if isinstance(value, str) else f"{value:g}"
            text = str(value) if isinstance(value, bool) else text
            assert told[name].replace("`", "").startswith(text), name


def test_a_link_that_leads_nowhere_is_a_warning(tmp_path: Path) -> None:
    # In a copy of the configuration, with one page.
    for name in ("inventories", "extensions", "conf.py"):
        (tmp_path / name).symlink_to(ROOT / "docs" / name)
    (tmp_path / "index.md").write_text(
        "# A\n\n[b](b.md) [c](#c)\n\n```{eval-rst}\n:class:`celery.nonesuch`\n```\n"
    )

    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", str(tmp_path), str(tmp_path / "html")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )

    missing = ["'b.md'", "'c'", "celery.nonesuch"]
    assert [one for one in missing if one not in built.stderr] == []


def test_the_reference_is_what_the_code_says() -> None:
    """`make reference` puts it right."""
    pages = [str(page) for page in sorted((ROOT / "docs/reference").glob("*.md"))]

    checked = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "--diff", "-I", "docs/extensions", *pages],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
