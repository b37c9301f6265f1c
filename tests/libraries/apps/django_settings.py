"""As little as Django and django-celery-results need."""

import os
from pathlib import Path

SECRET_KEY = "of a test"
INSTALLED_APPS = ["django_celery_results"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": Path(os.environ["FOLDER"]) / "db.sqlite3",
    }
}
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
CELERY_RESULT_EXTENDED = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
