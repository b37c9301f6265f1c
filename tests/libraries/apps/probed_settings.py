"""The example's project, as a test sees it: probes beside its app, and databases of each kind."""

import os
from typing import Any

from harness.app import Settings
from project.settings import *  # noqa: F403
from project.settings import DATABASE, INSTALLED_APPS

for name, value in Settings.from_environ().celery_conf().items():
    globals()[f"CELERY_{name.upper()}"] = value

INSTALLED_APPS = [*INSTALLED_APPS, "probes"]
IS_POSTGRESQL = "postgresql" in DATABASE["ENGINE"]


def variant(**changes: Any) -> dict[str, Any]:
    """The one database, with other options."""
    options = {**DATABASE.get("OPTIONS", {}), **changes.pop("OPTIONS", {})}
    return {**DATABASE, "OPTIONS": options, **changes}


DATABASES = {
    "default": variant(),
    "a minute": variant(CONN_MAX_AGE=60),
    "for ever": variant(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True),
}
if IS_POSTGRESQL:
    DATABASES["pooled"] = variant(OPTIONS={"pool": {"min_size": 1, "max_size": 1}})

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"short": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {
        "file": {
            "class": "logging.FileHandler",
            "filename": f"{os.environ['FOLDER']}/documents.log",
            "formatter": "short",
        }
    },
    "loggers": {"documents": {"handlers": ["file"], "level": "INFO", "propagate": False}},
}
