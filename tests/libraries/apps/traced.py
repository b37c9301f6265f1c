"""OpenTelemetry: the SDK, its batch processor and the instrumentation of Celery.

$SET_UP says where: "import" of this module, or "worker_process_init".
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery.signals import worker_process_init
from opentelemetry import baggage, context, metrics, trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


def write(file_name: str, **values: Any) -> None:
    with open(Path(os.environ["FOLDER"]) / file_name, "a") as file:
        file.write(json.dumps({**values, "pid": os.getpid()}) + "\n")


#: In a process where this is set, what would take the spans never answers.
backend_hangs = threading.Event()


class ToFile(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if backend_hangs.is_set():
            threading.Event().wait()
        for span in spans:
            assert span.context is not None
            write(
                "spans",
                name=span.name,
                id=span.context.span_id,
                trace=span.context.trace_id,
                parent=span.parent.span_id if span.parent is not None else None,
                status=span.status.status_code.name,
            )
        return SpanExportResult.SUCCESS


class MetricsToFile(MetricExporter):
    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        for resource in metrics_data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    write("metrics", name=metric.name)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        pass


def set_up(**_: Any) -> None:
    provider = TracerProvider()
    # By itself it would send a minute after the tests have ended.
    provider.add_span_processor(BatchSpanProcessor(ToFile(), schedule_delay_millis=60_000))
    trace.set_tracer_provider(provider)
    reader = PeriodicExportingMetricReader(MetricsToFile(), export_interval_millis=60_000)
    metrics.set_meter_provider(MeterProvider([reader]))
    CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call]


if os.environ["SET_UP"] == "import":
    set_up()
else:
    worker_process_init.connect(set_up, weak=False)


@app.task(base=IsolatedTask)
def work(number: int) -> dict[str, Any]:
    with trace.get_tracer(__name__).start_as_current_span(f"in body {number}"):
        pass
    metrics.get_meter(__name__).create_counter("calls_of_work").add(1)
    return {"pid": os.getpid(), "baggage": dict(baggage.get_all())}


@app.task(base=IsolatedTask)
def work_while_the_backend_hangs() -> int:
    backend_hangs.set()
    with trace.get_tracer(__name__).start_as_current_span("never sent"):
        pass
    return os.getpid()


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def work_in_batch(number: int) -> int:
    with trace.get_tracer(__name__).start_as_current_span(f"in batch {number}"):
        pass
    return os.getpid()


@app.task(base=IsolatedTask)
def send_from_body(number: int) -> str:
    with trace.get_tracer(__name__).start_as_current_span("sender in body"):
        task_id: str = work.delay(number).id
    return task_id


@app.task
def call(*numbers: int) -> list[str]:
    """The caller: a plain task that sends isolated ones."""
    token = context.attach(baggage.set_baggage("tenant", "Ada"))
    with trace.get_tracer(__name__).start_as_current_span("caller"):
        sent = [work.delay(number).id for number in numbers]
    context.detach(token)
    return sent


@app.task(base=IsolatedTask)
def end_of_the_last_child() -> None:
    """A slot starts its next process when the last one has exited."""


@app.task
def flush() -> bool:
    """Send what this slot has buffered."""
    done: bool = trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
    return done
