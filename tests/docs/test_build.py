"""The documentation builds without a warning, and says what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "html")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )

    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html/index.html").is_file()


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
