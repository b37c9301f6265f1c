"""`celery isolated`, and what the worker's own command is asked for."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.bin.celery import celery
from celery.bin.worker import worker
from click.testing import CliRunner, Result

from isolated_tasks import commands as cli
from isolated_tasks.advice import Advice, Verdict
from isolated_tasks.commands.audit import exit_code


@pytest.fixture
def app_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    source = (
        "from celery import Celery\napp = Celery('a', broker='memory://', set_as_current=False)\n"
    )
    (tmp_path / "app_of_test_cli.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield "app_of_test_cli"
    sys.modules.pop("app_of_test_cli", None)


def invoke(module: str, *arguments: str) -> Result:
    return CliRunner().invoke(celery, ["-A", module, "isolated", "audit", *arguments])


def test_celery_finds_the_command_by_itself() -> None:
    assert celery.commands["isolated"] is cli.isolated


def test_the_worker_has_the_option_once() -> None:
    assert [parameter.name for parameter in worker.params].count("memory_audit") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seconds", "0"], ["--seconds", "0"]),
        (["--seconds", "-1"], ["--seconds", "-1"]),
        (["--seconds", "nan"], ["--seconds", "nan"]),
        (["--seconds", "soon"], ["--seconds", "soon"]),
        (["--calls", "0"], ["--calls", "0"]),
        (["--calls", "2.5"], ["--calls", "2.5"]),
        (["--fail-on", "leaks"], ["--fail-on", "leaks", "keeps-its-peak", "grows"]),
    ],
)
def test_an_option_that_cannot_be_used_is_one_clear_error(
    app_module: str, arguments: list[str], named: list[str]
) -> None:
    result = invoke(app_module, "--json", *arguments)

    assert result.exit_code == 2
    for part in named:
        assert part in result.output
    assert "Traceback" not in result.output


def test_without_rich_there_is_one_clear_error(
    app_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)

    result = invoke(app_module, "--seconds", "0.1")

    assert result.exit_code == 2
    assert "pip install 'isolated-tasks[cli]'" in result.output


def test_json_does_without_rich(app_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rich", None)

    result = invoke(app_module, "--json", "--seconds", "0.1")

    assert result.exit_code == 0
    assert '"tasks": []' in result.output


def test_the_package_can_be_loaded_by_celery_without_rich() -> None:
    assert "rich" not in vars(cli)


def advice(*verdicts: Verdict) -> list[Advice]:
    return [Advice(f"t{n}", verdict, "", 9, 1) for n, verdict in enumerate(verdicts)]


F, K, G = Verdict.FINE, Verdict.KEEPS_ITS_PEAK, Verdict.GROWS
FEW, UN = Verdict.TOO_FEW_CALLS, Verdict.UNMEASURABLE


@pytest.mark.parametrize(
    ("verdicts", "fail_on", "code"),
    [
        ([F, K, G], G, 1),
        ([F, K, G], K, 1),
        ([F, K], K, 1),
        ([F, K], G, 0),
        ([F], K, 0),
        ([F, FEW, UN], G, 0),
        ([FEW, G], G, 1),
        ([FEW, UN], G, 3),
        ([], G, 3),
    ],
)
def test_the_exit_code_says_whether_a_task_is_as_bad_as_that(
    verdicts: list[Verdict], fail_on: Verdict, code: int
) -> None:
    assert exit_code(advice(*verdicts), fail_on, named=frozenset()) == code


@pytest.mark.parametrize(("verdict", "code"), [(F, 0), (FEW, 3), (UN, 3), (G, 1)])
def test_each_task_that_was_named_has_to_be_judged(verdict: Verdict, code: int) -> None:
    named: Any = frozenset({"t0", "t1"})

    assert exit_code(advice(F, verdict), G, named=named) == code
