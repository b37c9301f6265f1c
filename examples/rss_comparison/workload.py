"""The data file and the body of the task: load a lot, compute, keep next to nothing.

Nothing here holds on to the data, and still a plain worker keeps nearly all of their memory. As
the body works through the orders it remembers a figure for each customer that it has not met
before, as `functools.lru_cache`, an ORM's identity map or a date parser would. Each of these small
objects lies among the orders in one of the arenas (1 MiB) that Python's allocator took
from the kernel, and an arena can be given back only when nothing at all is left in it.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import zlib
from pathlib import Path
from typing import Any

from support import interruption

COLUMNS = ("order", "customer", "region", "quantity", "price", "remark")
REGIONS = 17

#: New customers keep turning up all through a year's orders: this many for each megabyte loaded.
CUSTOMERS_PER_MEGABYTE = 10

#: Orders that are parsed to learn how much memory one takes in this version of Python.
SAMPLE = 500

REMARK = (
    "goes to the neighbours when nobody opens; ring twice and wait a minute; mind the dog "
    "and the loose step behind the gate"
)

#: Each customer's discount, worked out once. This is all that a call leaves behind.
_discounts: dict[str, float] = {}


def summarise(path: str) -> dict[str, Any]:
    """The body of the task, the same one for every worker.

    Returns:
        The turnover of each region, which process worked it out, and the number and the weight
        of the objects that the process remembers.
    """
    orders = load(path)
    turnover = add_up(orders)
    # What the documentation of every leak advises; it does free the orders, each and every one,
    # and yet the kernel gets next to nothing back.
    del orders
    gc.collect()
    return {"turnover": turnover, "pid": os.getpid(), **left_behind()}


def load(path: str) -> list[dict[str, str]]:
    """Read a file of orders, tab-separated, with the columns' names in its first line."""
    with open(path, encoding="ascii") as lines:
        names = next(lines).rstrip("\n").split("\t")
        rows = (line.rstrip("\n").split("\t") for line in lines)
        return [dict(zip(names, row, strict=True)) for row in rows]


def add_up(orders: list[dict[str, str]]) -> dict[str, float]:
    """The turnover of each region."""
    turnover = {f"region-{region:02}": 0.0 for region in range(REGIONS)}
    for order in orders:
        amount = int(order["quantity"]) * float(order["price"])
        turnover[order["region"]] += amount * (1 - discount(order["customer"]))
    return turnover


def discount(customer: str) -> float:
    """Up to 10 % for a customer, remembered."""
    if customer not in _discounts:
        _discounts[customer] = zlib.crc32(customer.encode()) % 11 / 100
    return _discounts[customer]


def left_behind() -> dict[str, int]:
    """Number and weight of everything that this process remembers of the orders."""
    objects = [*_discounts.keys(), *_discounts.values()]
    weight = sys.getsizeof(_discounts) + sum(sys.getsizeof(each) for each in objects)
    return {"left_objects": len(objects), "left_bytes": weight}


def write_orders(path: Path, *, megabytes: int) -> int:
    """Write a file whose orders take `megabytes` of memory once loaded; return their number."""
    _write(path, count=SAMPLE, customers=SAMPLE)
    per_order = sum(map(_weight, load(str(path)))) / SAMPLE
    count = max(SAMPLE, int(megabytes * 1_000_000 / per_order))
    _write(path, count=count, customers=max(1, megabytes * CUSTOMERS_PER_MEGABYTE))
    return count


def _weight(order: dict[str, str]) -> int:
    return sys.getsizeof(order) + sum(sys.getsizeof(value) for value in order.values())


def _write(path: Path, *, count: int, customers: int) -> None:
    # Seeded, so that every run has the same data.
    random_customer = random.Random(1).randrange
    with path.open("w", encoding="ascii") as file:
        print(*COLUMNS, sep="\t", file=file)
        newest = -1
        for number in range(count):
            if not number % 10_000:
                interruption.check()
            met, newest = newest, number * customers // count
            customer = newest if newest != met else random_customer(newest + 1)
            file.write(
                f"{number:08}\tcustomer-{customer:06}\tregion-{number % REGIONS:02}\t"
                f"{number % 9 + 1}\t{number * 7919 % 100_000 / 100:.2f}\t"
                f"parcel {number % 99_991:05} {REMARK}\n"
            )
