"""A Django project whose tasks run in processes of their own."""

# So that @shared_task finds this app in web processes too.
from project.celery import app as celery_app

__all__ = ["celery_app"]
