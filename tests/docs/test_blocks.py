"""The code blocks of the pages are written as `harness.page` reads them."""

import re
from pathlib import Path

from markdown_it import MarkdownIt
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from harness.page import LANGUAGES

#: Why a block is not run: always, or on some machines.
REASON = re.compile(r'("[^"]{10,}"|if\(.+, reason="[^"]{10,}"\))')


def _nothing(example: Example) -> None:
    pass


def _fences(page: Path) -> list[tuple[int, str]]:
    """Line and language of each block; of an indented one, nothing."""
    tokens = MarkdownIt().parse(page.read_text())
    return [
        (token.map[0] + 1 if token.map else 0, token.info.strip())
        for token in tokens
        if token.type in ("fence", "code_block")
    ]


def test_each_block_has_a_language_that_is_run_or_parsed(page: Path) -> None:
    # A directive of MyST's is no code.
    languages = [(line, name) for line, name in _fences(page) if not name.startswith("{")]

    assert [(line, name) for line, name in languages if name not in LANGUAGES] == []


def test_each_block_that_a_reader_sees_is_found(page: Path) -> None:
    document = Document(page.read_text(), str(page))
    found = [region for name in LANGUAGES for region in CodeBlockParser(name, _nothing)(document)]
    seen = [region for region in found if not document.text[region.start :].startswith("<!--")]

    assert len(seen) == len([name for _, name in _fences(page) if name in LANGUAGES])


def test_each_skip_has_a_reason(page: Path) -> None:
    document = Document(page.read_text(), str(page))
    skips = [region.parsed for region in SkipParser()(document)]

    unreasoned = [skip for skip in skips if not REASON.fullmatch((skip[1] or "").strip())]
    assert [skip for skip in unreasoned if skip[0] != "end"] == []


def test_few_blocks_are_skipped(pages: list[Path]) -> None:
    blocks, skips = 0, []
    for page in pages:
        document = Document(page.read_text(), str(page))
        blocks += len([name for _, name in _fences(page) if name not in ("", "text")])
        skips += [(page.name, *region.parsed) for region in SkipParser()(document)]

    print(*skips, sep="\n")
    assert len(skips) <= blocks / 6
