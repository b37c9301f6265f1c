"""One word for each thing: what the glossary has a word for is not called otherwise anywhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("*/**/*")]
    if path.suffix in (".py", ".md", ".json", ".toml", ".yaml", ".ini")
    and path.relative_to(ROOT).parts[0]
    in ("README.md", "CHANGELOG.md", "docs", "examples", "isolated_tasks")
)

#: Words that are not said here, and what is said instead.
INSTEAD = {
    r"zygotes?|molds?": "forkserver",
    r"(work[- ])?horses?|sandbox(es|ed)?": "child",
    r"nann(y|ies)|watchdogs?": "supervisor",
    r"arbiters?": "main process",
    r"warm(ed|ing|s)?[ -]?up|primes?|primed|priming": "preload",
    r"jobs?": "task, or call",
    r"return ?codes?": "exit code",
    r"memory usage|max mem(ory)?": "RSS, PSS or USS",
    r"(dead|crashed) child(ren)?": "lost child",
    r"timeout limits?": "time limit",
}

#: Where one of them is right: what the line says, and why.
EXCEPTIONS = {
    r"no sandbox|As a sandbox": "that is what this package is not",
    r"\bRQ|fork per job": "RQ's own word",
    r"Work-horse terminated|failed job|killed job|after each job": "RQ's own words",
    r"github\.com/": "an address",
    r"no warm-up either": "computing something at import, which is no preload",
    r"to warm up, left|after the warm-up": "calls before those that are counted",
    r"warm_up": "the same, as a name",
    r"^ *return code$": "Python's statement",
    r"\.returncode": "the standard library's name",
    r"--jobs|ThreadPoolExecutor|jobs\.submit": "measurements side by side, as in make",
    r"kubectl|kind: (Cron)?Job": "Kubernetes' own word",
}
#: Pages about another program, whose words are in every line.
OTHERS = {"docs/how-to/coming-from-rq.md": "RQ's jobs"}


@pytest.mark.parametrize("words", INSTEAD)
def test_what_has_a_word_is_called_by_it(words: str) -> None:
    forbidden = re.compile(rf"\b({words})\b", re.I)
    excepted = re.compile("|".join(EXCEPTIONS), re.I)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        if str(path.relative_to(ROOT)) not in OTHERS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line) and not excepted.search(line)
    ]

    assert found == [], f"say {INSTEAD[words]!r}"


def test_the_words_that_are_said_are_in_the_glossary() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text()
    terms = re.findall(r"^\| \*\*(.+?)\*\* \|", glossary, re.M)

    assert terms == sorted(terms, key=str.casefold)
    said = {
        *("child", "forkserver", "worker", "main process", "slot", "supervisor", "start method"),
        *("preload", "body", "call", "outcome", "batch", "RSS, PSS, USS", "exit code"),
        "lost child",
    }
    assert said <= set(terms)
