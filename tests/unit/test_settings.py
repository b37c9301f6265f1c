"""Task attributes and app.conf become options; nothing else converts units."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from isolated_tasks import IsolatedMixin, IsolatedTask, OptionError
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.settings import (
    SETTINGS,
    TASK_OPTIONS,
    MemoryStep,
    WorkerSettings,
    check_settings,
    is_isolated,
    memory_ladder,
    process_options,
    result_codec,
    worker_settings,
)

MakeTask = Callable[..., Any]


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("settings", set_as_current=False) as app:
        yield app


@pytest.fixture
def make_task(app: Celery) -> MakeTask:
    """A task of the app with these attributes, bound."""

    def make(**attributes: Any) -> Any:
        # shared: or every app that is finalised later would get it as well.
        @app.task(name="tasks.render", shared=False, **{"base": IsolatedTask, **attributes})
        def render() -> None: ...

        return app.tasks["tasks.render"]

    return make


def refusal(action: Callable[[], object]) -> OptionError:
    with pytest.raises(OptionError) as caught:
        action()
    error = caught.value
    for part in (error.option, error.value, error.task or "app.conf"):
        assert part in str(error)
    return error


# ── where a value comes from ────────────────────────────────────────────────────────────────────

#: Each option of a process, with what its attribute is called there, and two values for it.
VALUES: list[tuple[str, str, Any, Any]] = [
    ("batch_size", "batch_size", 7, 8),
    ("batch_idle_timeout", "batch_idle_timeout", 0.5, 2.0),
    ("batch_memory_limit", "batch_memory_limit_bytes", 1000, 2000),
    ("memory_limit", "memory_limit_bytes", 1000, 2000),
    ("soft_memory_limit", "soft_memory_limit_bytes", 1000, 2000),
    ("cpu_time_limit", "cpu_time_limit", 1, 2),
    ("nice", "nice", 5, 10),
    ("max_open_files", "max_open_files", 64, 128),
    ("keep_children", "keep_children", True, False),
    ("max_result_bytes", "max_result_bytes", 1 << 20, 1 << 21),
    ("start_method", "start_method", "spawn", "forkserver"),
    ("env", "env", {"A": "1"}, {"B": "2"}),
]


def test_the_defaults_are_those_of_the_process_options(make_task: MakeTask) -> None:
    assert process_options(make_task()) == ProcessOptions("tasks.render")


def test_every_option_of_a_task_is_an_attribute_of_the_base_class() -> None:
    assert all(name in vars(IsolatedMixin) for name in TASK_OPTIONS)
    others = {"isolated", "result_serializer", "profile", "profile_every", "profile_directory"}
    assert {name for name, *_ in VALUES} | others == set(TASK_OPTIONS)


def test_a_result_serializer_has_outcomes_sent_as_plain_data(
    app: Celery, make_task: MakeTask
) -> None:
    task = make_task()
    assert (result_codec(task), process_options(task).plain_outcomes) == (None, False)

    app.conf.isolated_result_serializer = "json"

    assert result_codec(task) == ("application/json", "utf-8")
    assert process_options(task).plain_outcomes


@pytest.mark.parametrize("name", ["pickle", "nonesuch", 7])
def test_a_result_serializer_that_there_is_not_is_refused(
    make_task: MakeTask, name: object
) -> None:
    with pytest.raises(OptionError, match="result_serializer") as caught:
        make_task(result_serializer=name)

    assert (caught.value.task, caught.value.value) == ("tasks.render", repr(name))


@pytest.mark.parametrize(("option", "attribute", "value", "_"), VALUES)
def test_an_option_of_the_decorator_is_used(
    make_task: MakeTask, option: str, attribute: str, value: Any, _: Any
) -> None:
    assert getattr(process_options(make_task(**{option: value})), attribute) == value


@pytest.mark.parametrize(("option", "attribute", "value", "_"), VALUES)
def test_an_attribute_of_a_base_class_is_used(
    make_task: MakeTask, option: str, attribute: str, value: Any, _: Any
) -> None:
    base = type("Base", (IsolatedTask,), {option: value, "abstract": True})

    assert getattr(process_options(make_task(base=base)), attribute) == value


@pytest.mark.parametrize(("option", "attribute", "value", "_"), VALUES)
def test_a_setting_of_the_app_is_used_where_the_task_says_nothing(
    app: Celery, make_task: MakeTask, option: str, attribute: str, value: Any, _: Any
) -> None:
    app.conf[f"isolated_{option}"] = value

    assert getattr(process_options(make_task()), attribute) == value


@pytest.mark.parametrize(("option", "attribute", "value", "other"), VALUES)
def test_the_task_s_own_value_goes_before_the_app_s(
    app: Celery, make_task: MakeTask, option: str, attribute: str, value: Any, other: Any
) -> None:
    app.conf[f"isolated_{option}"] = other

    assert getattr(process_options(make_task(**{option: value})), attribute) == value


@pytest.mark.parametrize(("option", "attribute", "value", "other"), VALUES)
@pytest.mark.parametrize("pattern", ["tasks.render", "*"])
def test_an_annotation_goes_before_the_task_s_own_value(
    *,
    app: Celery,
    make_task: MakeTask,
    option: str,
    attribute: str,
    value: Any,
    other: Any,
    pattern: str,
) -> None:
    app.conf.task_annotations = {pattern: {option: value}}

    assert getattr(process_options(make_task(**{option: other})), attribute) == value


def test_isolation_is_switched_off_by_the_task_or_by_the_app(
    app: Celery, make_task: MakeTask
) -> None:
    task = make_task()
    assert is_isolated(task)

    app.conf.isolated_enabled = False
    assert not is_isolated(task)

    task.isolated = True
    assert is_isolated(task)

    task.isolated = False
    app.conf.isolated_enabled = True
    assert not is_isolated(task)


def test_celery_s_own_tasks_are_never_isolated() -> None:
    app = Celery("own", set_as_current=False, task_cls=IsolatedTask)

    chord_part = app.tasks["celery.accumulate"]

    assert isinstance(chord_part, IsolatedTask)
    assert not is_isolated(chord_part)


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (2**40, 2**40),
        ("1", 1),
        ("512", 512),
        ("512B", 512),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1M", 10**6),
        ("1MB", 10**6),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("  2 GB  ", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("0.5KiB", 512),
        ("2T", 2 * 10**12),
        ("2TiB", 2 * 2**40),
    ],
)
def test_a_size_is_read_in_the_units_that_people_write(
    make_task: MakeTask, size: int | str, expected: int
) -> None:
    assert process_options(make_task(batch_memory_limit=size)).batch_memory_limit_bytes == expected


# ── bad values ──────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[str, Any]] = [
    *(
        ("batch_memory_limit", value)
        for value in [
            *(0, -1, 1.5, True, b"1GiB", [1], math.inf, "12 parsecs"),
            *(2**63, "8388608TiB", "1" + "0" * 400),
            *(
                "",
                "big",
                "1 PiB",
                "1iB",
                "-1GiB",
                "1e9",
                "1.GiB",
                "GiB",
                "0",
                "0MiB",
                "0.1B",
                "1 GiB x",
            ),
        ]
    ),
    *(("soft_memory_limit", value) for value in [0, -1, "12 parsecs", "-1GiB", True, [1]]),
    *(
        ("memory_limit", value)
        for value in [
            *(0, -1, 1.5, True, "12 parsecs", (), [], {}),
            *(("1GiB", "1GiB"), ("2GiB", "1GiB"), ("1GiB", "12 parsecs"), ("1GiB", "large")),
            *(("1GiB", ("2GiB",)), ("1GiB", ("2GiB", 7)), ("1GiB", ("2GiB", "")), ("1GiB", None)),
        ]
    ),
    *(("cpu_time_limit", value) for value in [0, -1, 1.5, "12 parsecs", True]),
    *(("nice", value) for value in [-1, 20, 1.5, "5", True]),
    *(("max_open_files", value) for value in [0, 15, -1, 64.0, "64", True]),
    *(("batch_size", value) for value in [0, -1, 1.5, "2", True]),
    *(("batch_idle_timeout", value) for value in [0, -1, math.nan, math.inf, "5", True]),
    *(("start_method", value) for value in ["fork", "", 1]),
    *(("env", value) for value in ["A=1", ["A"], [("A", "1")], {"A": 1}, {"A=": "1"}]),
]


@pytest.mark.parametrize(("option", "value"), BAD, ids=repr)
def test_a_bad_value_of_a_task_gives_one_error_that_names_all(
    app: Celery, make_task: MakeTask, option: str, value: Any
) -> None:
    task = make_task()
    setattr(task, option, value)

    error = refusal(lambda: process_options(task))

    assert (error.task, error.option, error.value) == ("tasks.render", option, repr(value))


@pytest.mark.parametrize(("option", "value"), BAD, ids=repr)
def test_a_bad_value_of_the_app_is_refused_too(
    app: Celery, make_task: MakeTask, option: str, value: Any
) -> None:
    task = make_task()
    app.conf[f"isolated_{option}"] = value

    error = refusal(lambda: process_options(task))

    assert error.value == repr(value)


def test_a_bad_value_is_refused_when_the_task_is_made(app: Celery) -> None:
    with pytest.raises(OptionError, match=r"tasks.render.*batch_size=0"):

        @app.task(name="tasks.render", shared=False, base=IsolatedTask, batch_size=0, lazy=False)
        def render() -> None: ...


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"time_limit": "12 parsecs"}, "time_limit"),
        ({"time_limit": -1}, "time_limit"),
        ({"soft_time_limit": -0.5}, "soft_time_limit"),
        ({"soft_time_limit": math.nan}, "soft_time_limit"),
        ({"soft_time_limit": 3, "time_limit": 2}, "soft_time_limit"),
        ({"soft_memory_limit": "3GiB", "memory_limit": "2GiB"}, "soft_memory_limit"),
        ({"soft_memory_limit": "2GiB", "memory_limit": ("1GiB", "4GiB")}, "soft_memory_limit"),
    ],
)
def test_limits_that_cannot_be_are_refused_when_the_task_is_made(
    make_task: MakeTask, options: dict[str, Any], option: str
) -> None:
    error = refusal(lambda: make_task(**options))

    assert (error.task, error.option) == ("tasks.render", option)
    assert error.value == repr(options[option])
    assert "\n" not in str(error)


def test_a_time_limit_of_nothing_is_none_as_with_celery(make_task: MakeTask) -> None:
    make_task(time_limit=0, soft_time_limit=0)


def test_limits_may_be_equal(make_task: MakeTask) -> None:
    make_task(time_limit=2, soft_time_limit=2, memory_limit="1GiB", soft_memory_limit="1GiB")


# ── the memory ladder ───────────────────────────────────────────────────────────────────────────


def test_a_memory_limit_may_be_a_ladder(make_task: MakeTask) -> None:
    task = make_task(memory_limit=["1GiB", 3 << 30, ("16GiB", "large")])

    assert memory_ladder(task) == (
        MemoryStep(1 << 30),
        MemoryStep(3 << 30),
        MemoryStep(16 << 30, "large"),
    )
    limits = [process_options(task, step=step).memory_limit_bytes for step in range(4)]
    assert limits == [1 << 30, 3 << 30, 16 << 30, 16 << 30]


def test_the_app_may_have_a_memory_limit_for_all(app: Celery, make_task: MakeTask) -> None:
    app.conf.isolated_memory_limit = "1GiB"

    task = make_task()

    assert memory_ladder(task) == (MemoryStep(1 << 30),)
    task.memory_limit = "2GiB"
    assert memory_ladder(task) == (MemoryStep(2 << 30),)


# ── the app's own settings ──────────────────────────────────────────────────────────────────────


def test_an_app_without_settings_has_the_defaults(app: Celery) -> None:
    assert worker_settings(app) == WorkerSettings(
        preload=(), forkservers=1, eager=False, boot_timeout=120.0, start_timeout=60.0
    )


@pytest.mark.parametrize(
    ("setting", "value", "attribute", "expected"),
    [
        ("isolated_preload", ["a", "b.c"], "preload", ("a", "b.c")),
        ("isolated_preload", ("a",), "preload", ("a",)),
        ("isolated_preload", "a, b.c d", "preload", ("a", "b.c", "d")),
        ("isolated_preload", "", "preload", ()),
        ("isolated_forkservers", 3, "forkservers", 3),
        ("isolated_forkservers", None, "forkservers", 1),
        ("isolated_spares", 2, "spares", 2),
        ("isolated_spares", None, "spares", 1),
        ("isolated_eager", True, "eager", True),
        ("isolated_worker_process_init", False, "worker_process_init", False),
        ("isolated_boot_timeout", 7, "boot_timeout", 7.0),
        ("isolated_start_timeout", 0.5, "start_timeout", 0.5),
        ("isolated_term_grace", 2, "term_grace", 2.0),
        ("isolated_memory_budget", "1GiB", "memory_budget", 1 << 30),
        ("isolated_memory_budget", 1000, "memory_budget", 1000),
        ("isolated_memory_budget", "auto", "memory_budget", "auto"),
        ("isolated_max_redeliveries", 0, "max_redeliveries", 0),
        ("isolated_memory_audit", True, "memory_audit", True),
        ("isolated_memory_audit", None, "memory_audit", False),
        ("isolated_prometheus_port", 9808, "prometheus_port", 9808),
        ("isolated_prometheus_port", 0, "prometheus_port", 0),
        ("isolated_prometheus_port", None, "prometheus_port", None),
        ("isolated_prometheus_host", "::1", "prometheus_host", "::1"),
        ("isolated_prometheus_host", None, "prometheus_host", "0.0.0.0"),
    ],
)
def test_a_setting_of_the_worker_is_read(
    app: Celery, setting: str, value: Any, attribute: str, expected: Any
) -> None:
    app.conf[setting] = value

    assert getattr(worker_settings(app), attribute) == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("isolated_preload", value) for value in [7, [7], {"a": 1}, b"a", [None]]),
        *(("isolated_forkservers", value) for value in [0, -1, 1.0, "2", True]),
        *(("isolated_spares", value) for value in [-1, 1.0, "2", True]),
        *(
            (setting, value)
            for setting in (
                "isolated_boot_timeout",
                "isolated_start_timeout",
                "isolated_term_grace",
            )
            for value in [0, -1, "60", True, math.nan, math.inf, 1e300]
        ),
        *(
            ("isolated_memory_budget", value)
            for value in [0, -1, "12 parsecs", "all", True, 1.5, 2**63]
        ),
        *(("isolated_max_redeliveries", value) for value in [-1, "3", 1.5, True]),
        *(("isolated_prometheus_port", value) for value in [-1, 65536, "9808", 1.5, True]),
        *(("isolated_prometheus_host", value) for value in ["", 7, b"::1"]),
    ],
    ids=repr,
)
def test_a_bad_setting_of_the_worker_gives_one_error_that_names_it(
    app: Celery, setting: str, value: Any
) -> None:
    app.conf[setting] = value

    error = refusal(lambda: worker_settings(app))

    assert (error.task, error.option, error.value) == (None, setting, repr(value))


def test_a_memory_budget_is_for_one_forkserver(app: Celery) -> None:
    app.conf.isolated_memory_budget = "1GiB"
    app.conf.isolated_forkservers = 2

    error = refusal(lambda: worker_settings(app))

    assert error.option == "isolated_memory_budget"
    assert "isolated_forkservers" in str(error)


def test_the_start_timeout_of_the_app_is_that_of_its_processes(
    app: Celery, make_task: MakeTask
) -> None:
    app.conf.isolated_start_timeout = 7

    assert process_options(make_task()).start_timeout == 7.0


# ── names ───────────────────────────────────────────────────────────────────────────────────────


class NewNames:
    isolated_batch_size = 4
    isolated_start_timeout = 7


class OldNames:
    ISOLATED_BATCH_SIZE = 4
    ISOLATED_START_TIMEOUT = 7


class DjangoNames:
    CELERY_ISOLATED_BATCH_SIZE = 4
    CELERY_ISOLATED_START_TIMEOUT = 7


@pytest.mark.parametrize(
    ("source", "namespace"), [(NewNames, None), (OldNames, None), (DjangoNames, "CELERY")]
)
def test_a_setting_is_found_under_each_name_that_celerys_own_may_have(
    app: Celery, make_task: MakeTask, source: type, namespace: str | None
) -> None:
    app.config_from_object(source, namespace=namespace)

    check_settings(app)
    assert process_options(make_task()).batch_size == 4
    assert worker_settings(app).start_timeout == 7.0


@pytest.mark.parametrize(
    ("argument", "setting", "value"),
    [
        ("isolated.batch_size=4", "isolated_batch_size", 4),
        ("isolated.batch_idle_timeout=1.5", "isolated_batch_idle_timeout", 1.5),
        ("isolated.batch_memory_limit=1GiB", "isolated_batch_memory_limit", "1GiB"),
        ("isolated.enabled=no", "isolated_enabled", False),
        ("isolated.preload=numpy,pandas", "isolated_preload", "numpy,pandas"),
    ],
)
def test_a_setting_can_come_from_the_command_line(
    app: Celery, argument: str, setting: str, value: Any
) -> None:
    app.config_from_cmdline([argument], namespace="worker")

    check_settings(app)
    assert app.conf[setting] == value


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_every_setting_is_known(app: Celery, setting: str) -> None:
    app.conf[setting] = None

    check_settings(app)


@pytest.mark.parametrize(
    ("source", "namespace", "name", "hint"),
    [
        ({"isolated_batchsize": 3}, None, "isolated_batchsize", ", did you mean 'isolated_batch_"),
        ({"isolated_enable": 0}, None, "isolated_enable", ", did you mean 'isolated_enabled'?"),
        ({"ISOLATED_PRELOADS": 0}, None, "ISOLATED_PRELOADS", ", did you mean 'isolated_preload'?"),
        ({"isolated_zzz": 0}, None, "isolated_zzz", "there is no such setting"),
        (
            type("Django", (), {"CELERY_ISOLATED_BATCHSIZE": 3}),
            "CELERY",
            "CELERY_ISOLATED_BATCHSIZE",
            ", did you mean 'isolated_batch_size'?",
        ),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_that_was_meant(
    app: Celery, source: Any, namespace: str | None, name: str, hint: str
) -> None:
    app.config_from_object(source, namespace=namespace)

    error = refusal(lambda: check_settings(app))

    assert error.option == name
    assert hint in str(error)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batchsize", "batch_size"),
        ("batch_sizes", "batch_size"),
        ("isolate", "isolated"),
        ("batch_idle_timout", "batch_idle_timeout"),
        ("isolated_batch_size", "batch_size"),
        ("startmethod", "start_method"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(
    make_task: MakeTask, name: str, meant: str
) -> None:
    error = refusal(lambda: make_task(**{name: 3}))

    assert (error.task, error.option) == ("tasks.render", name)
    assert f"did you mean {meant!r}?" in str(error)


@pytest.mark.parametrize("name", ["batch", "size", "environment", "start", "model", "isolation"])
def test_any_other_attribute_is_the_users_own(make_task: MakeTask, name: str) -> None:
    assert getattr(make_task(**{name: 3}), name) == 3


def test_a_method_may_have_any_name(make_task: MakeTask) -> None:
    class Base(IsolatedTask):
        abstract = True

        def batchsize(self) -> int:
            return 3

        @property
        def isolate(self) -> bool:
            return True

    assert make_task(base=Base).batchsize() == 3
