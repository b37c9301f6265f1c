"""A database of a test's own: on a PostgreSQL, or of SQLite where there is none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg

from harness.services import ServiceMissing

#: Where one is looked for without $DATABASE_URL.
LOCAL = "postgresql://postgres@127.0.0.1:5432/postgres"


@dataclass(frozen=True)
class Database:
    """One database, empty at first."""

    #: For $DATABASE_URL.
    url: str
    #: Where its server takes orders; None for SQLite.
    server: str | None = None

    @property
    def has_server(self) -> bool:
        return self.server is not None

    def connections(self) -> list[tuple[Any, ...]]:
        """Who is connected to it, as the server has it: pid of the backend, port of the client."""
        assert self.server is not None
        with psycopg.connect(self.server, autocommit=True) as connection:
            name = urlsplit(self.url).path.lstrip("/")
            return connection.execute(
                "select pid, client_port, state, query from pg_stat_activity where datname = %s",
                (name,),
            ).fetchall()


@contextmanager
def new_database(folder: Path) -> Iterator[Database]:
    """Make a database, and drop it at the end; a file in `folder` where there is no server."""
    try:
        server = find_postgresql()
    except ServiceMissing:
        yield Database(f"sqlite:///{folder}/db.sqlite3")
        return
    name = f"isolated_tasks_test_{os.urandom(6).hex()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"create database {name}".encode())
        try:
            yield Database(urlunsplit(urlsplit(server)._replace(path=f"/{name}")), server)
        finally:
            connection.execute(f"drop database {name} with (force)".encode())


def find_postgresql() -> str:
    """Return the URL of a PostgreSQL that answers.

    Raises:
        ServiceMissing: nothing answers there.
    """
    url = os.environ.get("DATABASE_URL") or LOCAL
    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.Error as exc:
        raise ServiceMissing(f"no PostgreSQL at {urlsplit(url).hostname}: {exc}") from exc
    return url
