"""Try each library: imported in the forkserver, used there, and in a fresh interpreter."""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from fork_safety import servers, uses
from harness.app import Settings, close_app, make_app
from harness.worker import start_worker

FOLDER = Path(__file__).parents[1]
#: Longer than the time limit of the bodies.
PATIENCE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="*", help=f"some of {', '.join(uses.LIBRARIES)}")
    parser.add_argument("--redis", default="redis://127.0.0.1:6379/0")
    parser.add_argument("--postgres", default="postgresql://root@127.0.0.1:5432/postgres")
    parser.add_argument("--json", type=Path, help="write the findings there too")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    options = parser.parse_args()
    found = {}
    environment = {uses.REDIS: options.redis, uses.POSTGRES: options.postgres}
    with servers.serving() as addresses:
        for library in options.libraries or uses.LIBRARIES:
            version = uses.version(library)
            if version is None:
                print(f"{library} is not installed, and left out", file=sys.stderr)
                continue
            found[library] = {
                "version": version,
                "imported": trial(library, "imported", {**environment, **addresses}, options.redis),
                "used": trial(library, "used", {**environment, **addresses}, options.redis),
            }
            print(library, json.dumps(found[library]), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    text = table(found)
    print(text)
    if options.write:
        page = options.write.read_text()
        begin, end = "<!-- fork_safety -->", "<!-- end -->"
        pattern = f"{re.escape(begin)}.*?{end}"
        options.write.write_text(
            re.sub(pattern, lambda _: f"{begin}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
        )


def trial(library: str, how: str, environment: dict[str, str], redis: str) -> dict[str, Any]:
    """What a worker says whose forkserver has imported or used a library, and what a child does."""
    name = f"fork-safety-{os.urandom(4).hex()}"
    conf = {"isolated_preload": [f"fork_safety.{how}"], "isolated_boot_timeout": 60}
    settings = Settings(broker_url=redis, result_backend=redis, name=name, conf=conf)
    app = make_app("client", settings)
    with tempfile.TemporaryDirectory(prefix="it-") as folder:
        worker = start_worker(
            "fork_safety.app",
            pool="prefork",
            concurrency=2,
            app=app,
            env={
                **settings.environ(),
                **environment,
                "FORK_SAFETY_LIBRARY": library,
                "TMPDIR": folder,
            },
            path=[FOLDER, FOLDER.parent / "support"],
            cwd=Path(folder),
        )
        try:
            worker.wait_until_ready()
            calls = [worker.call("fork_safety.app.tell", library) for _ in range(2)]
            outcomes = [outcome(call) for call in calls]
            result = {"children": outcomes, **said(worker.log())}
            if how == "imported":
                result["spawned"] = outcome(worker.call("fork_safety.app.tell_spawned", library))
            return result
        finally:
            worker.close()
            close_app(app)


def outcome(call: Any) -> dict[str, Any]:
    try:
        return dict(call.get(timeout=PATIENCE))
    except Exception as exc:
        return {"error": type(exc).__name__, "text": str(exc).splitlines()[0][:200]}


def said(log: str) -> dict[str, Any]:
    """What the preload check has found."""
    threads = re.search(r"left (\d+) thread\(s\) running \((.*?)\)", log)
    sockets = re.search(r"left (\d+) socket\(s\) open", log)
    failed = re.search(r"failed to load (\S+):\n(?:.*\n)*?(\S*(?:Error|Exception)\b.*)", log)
    return {
        "threads": int(threads[1]) if threads else 0,
        "sockets": int(sockets[1]) if sockets else 0,
        "failed": failed[2] if failed else "",
    }


# ── the table ───────────────────────────────────────────────────────────────────────────────────


def table(found: dict[str, Any]) -> str:
    lines = [
        "| library | imported in the forkserver | the log names | used there | the log names "
        '| `start_method="spawn"` |',
        "|---|---|---|---|---|---|",
    ]
    for library, one in found.items():
        cells = [
            cell(one["imported"], one["imported"]["children"]),
            named(one["imported"]),
            cell(one["used"], one["used"]["children"]),
            named(one["used"]),
            cell(one["imported"], [one["imported"]["spawned"]]),
        ]
        lines.append(f"| {uses.LIBRARIES[library]} {one['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(trial: dict[str, Any], children: list[dict[str, Any]]) -> str:
    if trial["failed"]:
        return f"does not load: {trial['failed']}"
    errors = [one for one in children if "error" in one]
    if errors:
        limit = errors[0]["error"] == "TimeLimitExceeded"
        return "**hangs**" if limit else f"**fails**: `{errors[0]['error']}`"
    return "**one connection for all**" if any(c["shared"] for c in children) else "works"


def named(trial: dict[str, Any]) -> str:
    parts = [
        f"{number} {what}{'' if number == 1 else 's'}"
        for what in ("thread", "socket")
        if (number := trial[f"{what}s"])
    ]
    return ", ".join(parts) or "–"


if __name__ == "__main__":
    main()
