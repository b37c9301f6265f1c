"""The Grafana dashboard, and the page about it, have the metrics that the exporter exposes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from isolated_tasks import ExitReason
from isolated_tasks.prometheus import _Collector

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "examples/grafana_dashboard.json").read_text())
PAGE = (ROOT / "docs/how-to/trace-and-measure.md").read_text()

#: Which samples a metric of each type has.
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}

#: Those of every metric that Prometheus has scraped.
SCRAPED_LABELS = {"instance", "job"}


def labels_of(family: Any) -> set[str]:
    return set(family._labelnames)


def exposed() -> dict[str, set[str]]:
    """The labels of each sample, by its name."""
    samples = {}
    for family in _Collector().describe():
        for suffix in SUFFIXES[family.type]:
            labels = labels_of(family)
            samples[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return samples


EXPOSED = exposed()


TARGETS = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
EXPRESSIONS = [target["expr"] for target in TARGETS]


def words(expression: str) -> set[str]:
    """What is neither a function or operator, nor within a string, a range or a label's list."""
    for pattern in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^]]*\]", r"\bby \([^)]*\)", r"\w+ ?(?=\()"):
        expression = re.sub(pattern, " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", expression)) - {"sum", "by"}


def used_labels(expression: str) -> set[str]:
    listed = re.findall(r"\bby \(([^)]*)\)", expression)
    matched = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression)
    return {label.strip() for labels in listed for label in labels.split(",")} | set(matched)


def shown_labels(legend: str) -> set[str]:
    return set(re.findall(r"\{\{(\w+)\}\}", legend))


def test_it_can_be_imported_anywhere() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("isolated-tasks", "isolated_tasks")
    # One that an import does not ask for, and that works where the source has any name.
    assert "__inputs" not in DASHBOARD
    assert DASHBOARD.get("id") is None
    datasource, *others = DASHBOARD["templating"]["list"]
    assert (datasource["type"], datasource["query"]) == ("datasource", "prometheus")
    asking = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"] + others
    assert {one["datasource"]["uid"] for one in asking} == {"${datasource}"}


def test_no_two_panels_have_one_id_or_one_place() -> None:
    panels = DASHBOARD["panels"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in taken) < 24
        cells |= taken

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel.get("description") for panel in panels if panel["type"] != "row")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_uses_what_is_exposed(expression: str) -> None:
    (name,) = words(expression)

    assert name in EXPOSED
    assert used_labels(expression) <= EXPOSED[name] | SCRAPED_LABELS
    assert expression.count("(") == expression.count(")")


def test_a_legend_shows_labels_that_are_left() -> None:
    for target in TARGETS:
        assert shown_labels(target["legendFormat"]) <= used_labels(target["expr"]), target


def test_a_variable_lists_the_labels_of_what_is_exposed() -> None:
    for variable in DASHBOARD["templating"]["list"][1:]:
        query = variable["query"]["query"]
        found = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query)
        assert found, query
        assert found[2] in EXPOSED[found[1]] | SCRAPED_LABELS
        assert f'{variable["name"]}=~"${variable["name"]}"' in " ".join(EXPRESSIONS)


def test_every_metric_is_shown() -> None:
    shown = {name for expression in EXPRESSIONS for name in words(expression)}

    for family in _Collector().describe():
        assert shown & {family.name + suffix for suffix in SUFFIXES[family.type]}, family.name


def test_the_table_of_the_page_is_that_of_the_exporter() -> None:
    rows = re.findall(r"^\| `(isolated_tasks_\w+)` \| (\w+) \| (.*?) ?\|", PAGE, re.MULTILINE)

    assert {(name, kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels in rows} == {
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            frozenset(labels_of(family)),
        )
        for family in _Collector().describe()
    }


def test_the_page_names_each_exit_reason_and_no_metric_that_there_is_not() -> None:
    families = {family.name for family in _Collector().describe()}

    assert set(re.findall(r"\bisolated_tasks_\w+", PAGE)) <= families | set(EXPOSED)
    assert [str(reason) for reason in ExitReason if f"`{reason}`" not in PAGE] == []
