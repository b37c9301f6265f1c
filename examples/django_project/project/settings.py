"""Settings: the database of $DATABASE_URL, else PostgreSQL on this machine, else SQLite."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SECRET_KEY", "of an example")
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "testserver"]
ROOT_URLCONF = "project.urls"
INSTALLED_APPS = ["documents"]
MIDDLEWARE: list[str] = []
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"


def database(url: str) -> dict[str, Any]:
    """What Django wants for ``postgresql://user:password@host:port/name`` or ``sqlite:///path``."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": unquote(parts.path)}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.lstrip("/")),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": parts.port or "",
        "OPTIONS": dict(parse_qsl(parts.query)),
    }


def answers(url: str) -> bool:
    """Whether there is such a database, and a driver to ask it with."""
    try:
        import psycopg
    except ImportError:
        return False
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.Error:
        return False
    return True


LOCAL = "postgresql://postgres@127.0.0.1:5432/isolated_tasks_example"

DATABASE = database(
    os.environ.get("DATABASE_URL")
    or (LOCAL if answers(LOCAL) else f"sqlite://{BASE_DIR}/db.sqlite3")
)

# A connection of a web process, and in a worker of a batch, may live for a minute.
DATABASES = {"default": {**DATABASE, "CONN_MAX_AGE": 60}}

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0")
CELERY_RESULT_BACKEND = os.environ.get("RESULT_BACKEND", CELERY_BROKER_URL)
# Any of our settings can stand here, CELERY_ and its name in upper case.
CELERY_ISOLATED_MEMORY_LIMIT = "1GiB"
