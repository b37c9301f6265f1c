"""``python -m soak``: run a soak and print its table."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from soak.run import Options, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="of chaos (default 3600)")
    parser.add_argument("--seed", type=int, help="of what is random (default: a new one)")
    parser.add_argument("--brokers", default="redis,amqp", help="default redis,amqp")
    parser.add_argument("--pools", default="prefork,threads", help="default prefork,threads")
    parser.add_argument("--rate", type=float, default=Options.rate, help="calls a second")
    parser.add_argument(
        "--every", type=float, default=Options.every, help="seconds for each attack"
    )
    parser.add_argument("--warm-up", type=float, default=Options.warm_up, help="seconds")
    parser.add_argument("--rest-every", type=float, default=Options.rest_every, help="seconds")
    parser.add_argument("--plain", action="store_true", help="Celery's own tasks, to compare")
    parser.add_argument("--output", type=Path, help="folder of table, JSON, ledger and logs")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    folder = (arguments.output or Path(tempfile.mkdtemp(prefix="soak-report-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.log"), *folder.glob("ledger.jsonl")):
        old.unlink()
    print(f"seed {seed}, into {folder}", flush=True)
    options = Options(
        seed=seed,
        seconds=arguments.seconds,
        brokers=arguments.brokers.split(","),
        pools=arguments.pools.split(","),
        rate=arguments.rate,
        every=arguments.every,
        warm_up=arguments.warm_up,
        rest_every=arguments.rest_every,
        plain=arguments.plain,
    )
    report = run(options, folder, lambda line: print(line, flush=True))
    table = "\n".join(report.lines())
    (folder / "report.md").write_text(table + "\n")
    (folder / "report.json").write_text(report.json() + "\n")
    print(table)
    for line in report.details():
        print(line, file=sys.stderr)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
