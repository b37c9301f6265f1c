"""One use of each library, as a body would make it. What a program keeps, a client say, is kept.

Each returns None, or, where it talks to a server, whom the server takes it for: the same answer in
two processes means that they have a connection in common.
"""

import importlib
import importlib.metadata
import os
import threading
from collections.abc import Callable
from typing import Any

#: Where the servers are: see `servers`.
HTTP, GRPC, MONGO = "FORK_SAFETY_HTTP", "FORK_SAFETY_GRPC", "FORK_SAFETY_MONGO"
POSTGRES, REDIS = "DATABASE_URL", "FORK_SAFETY_REDIS"

#: Clients, as a module of an app keeps them.
kept: dict[str, Any] = {}

#: What the forkserver's own use has returned.
first: Any = None


def keep(name: str, make: Callable[[], Any]) -> Any:
    if name not in kept:
        kept[name] = make()
    return kept[name]


# ── that compute ────────────────────────────────────────────────────────────────────────────────


def use_numpy() -> None:
    import numpy as np

    a = np.ones((600, 600))
    assert (a @ a)[0, 0] == 600


def use_scipy() -> None:
    import numpy as np
    import scipy.linalg

    assert abs(scipy.linalg.inv(np.eye(400) * 2)[0, 0] - 0.5) < 1e-9


def use_pandas() -> None:
    import pandas as pd

    frame = pd.DataFrame({"key": list(range(10)) * 1000, "value": 1.0})
    assert frame.groupby("key")["value"].sum()[3] == 1000


def use_polars() -> None:
    import polars as pl

    frame = pl.DataFrame({"key": list(range(10)) * 10_000, "value": [1.0] * 100_000})
    assert frame.group_by("key").agg(pl.col("value").sum()).height == 10


def use_pyarrow() -> None:
    import io

    import pyarrow.csv

    text = b"a,b\n" + b"1,2\n" * 500_000
    table = pyarrow.csv.read_csv(
        io.BytesIO(text), read_options=pyarrow.csv.ReadOptions(use_threads=True, block_size=1 << 16)
    )
    assert table.group_by("a", use_threads=True).aggregate([("b", "sum")]).num_rows == 1


def use_sklearn() -> None:
    import numpy as np
    from sklearn.cluster import KMeans

    data = np.random.default_rng(1).random((4000, 8))
    assert len(set(KMeans(4, n_init=1, random_state=1).fit_predict(data))) == 4


def use_joblib() -> None:
    import joblib

    assert joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(-n) for n in range(4)) == [0, 1, 2, 3]


def use_torch() -> None:
    import torch

    a = torch.ones(600, 600, requires_grad=True)
    (a @ a).sum().backward()
    assert a.grad is not None


def use_tensorflow() -> None:
    import tensorflow as tf

    a = tf.ones((600, 600))
    assert float((a @ a)[0, 0]) == 600


def use_cv2() -> None:
    import cv2
    import numpy as np

    image = np.ones((2000, 2000, 3), np.uint8)
    assert cv2.GaussianBlur(image, (9, 9), 0).shape == image.shape


def use_PIL() -> None:
    import io

    from PIL import Image

    Image.new("RGB", (800, 600)).resize((80, 60)).save(io.BytesIO(), "PNG")


def use_matplotlib() -> None:
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.plot([1, 2, 3])
    pyplot.savefig(io.BytesIO())
    pyplot.close()


def use_lxml() -> None:
    from lxml import etree

    assert etree.fromstring("<a><b/></a>").find("b") is not None


# ── that connect ────────────────────────────────────────────────────────────────────────────────


def use_psycopg() -> Any:
    import psycopg

    link = keep("psycopg", lambda: psycopg.connect(os.environ[POSTGRES], autocommit=True))
    return link.execute("SELECT pg_backend_pid()").fetchone()[0]


def use_psycopg2() -> Any:
    import psycopg2

    link = keep("psycopg2", lambda: psycopg2.connect(os.environ[POSTGRES]))
    with link.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


def use_sqlalchemy() -> Any:
    import sqlalchemy

    url = os.environ[POSTGRES].replace("postgresql://", "postgresql+psycopg2://")
    engine = keep("sqlalchemy", lambda: sqlalchemy.create_engine(url))
    with engine.connect() as link:
        return link.execute(sqlalchemy.text("SELECT pg_backend_pid()")).scalar()


def use_redis() -> Any:
    import redis

    return keep("redis", lambda: redis.Redis.from_url(os.environ[REDIS])).client_id()


def use_pymongo() -> Any:
    import pymongo

    client = keep("pymongo", lambda: pymongo.MongoClient(os.environ[MONGO]))
    return client.admin.command("ping")["peer"]


def use_requests() -> Any:
    import requests

    return keep("requests", requests.Session).get(os.environ[HTTP]).text


def use_urllib3() -> Any:
    import urllib3

    return keep("urllib3", urllib3.PoolManager).request("GET", os.environ[HTTP]).data.decode()


def use_boto3() -> Any:
    import boto3
    import botocore.config

    client = keep(
        "boto3",
        lambda: boto3.client(
            "s3",
            endpoint_url=os.environ[HTTP],
            region_name="us-east-1",
            aws_access_key_id="none",
            aws_secret_access_key="none",
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        ),
    )
    return client.get_object(Bucket="bucket", Key="key")["Body"].read().decode()


def use_grpc() -> Any:
    import grpc

    channel = keep("grpc", lambda: grpc.insecure_channel(os.environ[GRPC]))
    return channel.unary_unary("/test/peer")(b"", timeout=10).decode()


def use_opentelemetry() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    def make() -> TracerProvider:
        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=os.environ[HTTP] + "/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return provider

    provider = keep("opentelemetry", make)
    with provider.get_tracer("test").start_as_current_span("span"):
        pass
    assert provider.force_flush(10_000)
    return arrived("/traces")


def use_sentry_sdk() -> Any:
    import sentry_sdk

    url = os.environ[HTTP].replace("http://", "http://key@")
    keep("sentry_sdk", lambda: sentry_sdk.init(dsn=f"{url}/1", default_integrations=False))
    sentry_sdk.capture_message("a message")
    sentry_sdk.flush(timeout=10)
    return arrived("/api/1/envelope/")


def arrived(path: str) -> None:
    """See that what this process has sent to a path has come to the server."""
    import http.client

    host = os.environ[HTTP].removeprefix("http://")
    link = http.client.HTTPConnection(host, timeout=10)
    link.request("GET", f"/arrived{path}")
    count = int(link.getresponse().read())
    link.close()
    assert count > 0, "nothing has arrived"


# ── all ─────────────────────────────────────────────────────────────────────────────────────────

#: The module of each library, and the distribution that has its version.
LIBRARIES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "polars": "polars",
    "pyarrow": "pyarrow",
    "sklearn": "scikit-learn",
    "joblib": "joblib",
    "torch": "torch",
    "tensorflow": "tensorflow",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "lxml": "lxml",
    "psycopg": "psycopg",
    "psycopg2": "psycopg2-binary",
    "sqlalchemy": "sqlalchemy",
    "redis": "redis",
    "pymongo": "pymongo",
    "requests": "requests",
    "urllib3": "urllib3",
    "boto3": "boto3",
    "grpc": "grpcio",
    "opentelemetry": "opentelemetry-sdk",
    "sentry_sdk": "sentry-sdk",
}

#: What has to be imported for one that has its parts elsewhere.
ALSO = {
    "sklearn": ["sklearn.cluster"],
    "pyarrow": ["pyarrow.csv", "pyarrow.compute"],
    "matplotlib": ["matplotlib.pyplot"],
    "scipy": ["scipy.linalg"],
    "PIL": ["PIL.Image"],
    "lxml": ["lxml.etree"],
    "opentelemetry": ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"],
}


def version(library: str) -> str | None:
    """Its version; None where it is not installed."""
    names = [LIBRARIES[library], f"{LIBRARIES[library]}-cpu"]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def load(library: str) -> None:
    for module in [library, *ALSO.get(library, [])]:
        importlib.import_module(module)


def use(library: str) -> Any:
    return globals()[f"use_{library}"]()


def threads() -> int:
    """All of this process, also those that Python does not know."""
    return len(os.listdir("/proc/self/task"))


def tell(library: str) -> dict[str, Any]:
    """Use it, in a child."""
    peer = use(library)
    return {
        "shared": peer is not None and peer == first,
        "threads": threads(),
        "python_threads": threading.active_count(),
    }
