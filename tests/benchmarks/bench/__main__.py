"""``python -m bench --output FOLDER``: measure, print, and write JSON and a plot."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: Module and function of each section.
SECTIONS = {
    "alone": "bench.alone:measure",
    "celery": "bench.through_celery:measure",
    "slots": "bench.through_celery:measure_slots",
    "imports": "bench.imports:measure",
    "payloads": "bench.payloads:measure",
    "baseline": "bench.baseline:measure",
    "growth": "bench.growth:measure",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure what a call costs.")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--short", action="store_true", help="see that it works, no more")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, output: Path, *, short: bool) -> None:
    """Measure one section, in this process."""
    from bench import scale

    module, _, function = SECTIONS[name].partition(":")
    run = getattr(importlib.import_module(module), function)
    section = run(scale.SHORT if short else scale.FULL)
    output.write_text(json.dumps(section.to_json()))


def main() -> None:
    """Measure all, each section in a process of its own."""
    options = parse()
    if options.section:
        measure(options.section, options.output, short=options.short)
        return
    from rich.console import Console

    from bench import report
    from bench.figures import Section
    from harness.services import redis_service

    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    about = report.machine()
    console.print(about)
    sections = {}
    with redis_service() as url, tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", "bench", "--section", name, "--output", str(found)]
            command += ["--short"] if options.short else []
            subprocess.run(command, env={**os.environ, "BENCH_URL": url}, check=True)
            sections[name] = Section.from_json(json.loads(found.read_text()))
            report.show(sections[name], console)
    report.write(sections, about, options.output)
    console.print(f"{options.output}/bench.json, bench.png, bench.svg")


if __name__ == "__main__":
    main()
