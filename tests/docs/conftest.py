"""The documentation: its pages run, it builds, and it says what the code says."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


PAGES = sorted([ROOT / "README.md", ROOT / "examples/README.md", *ROOT.glob("docs/**/*.md")])


@pytest.fixture(scope="session")
def pages() -> list[Path]:
    """All pages of the documentation."""
    return PAGES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a page runs once for each; for a page with code, for each of these."""
    with_code = [page for page in PAGES if "```" in page.read_text()]
    for name, values in {"page": PAGES, "page_with_code": with_code}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[str(one.relative_to(ROOT)) for one in values])
