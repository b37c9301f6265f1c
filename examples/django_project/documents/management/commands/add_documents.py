"""Store texts and have a worker count their words: ``manage.py add_documents README.md …``."""

import time
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from documents.models import Document
from documents.tasks import count_words

#: For a worker to answer, in seconds.
PATIENCE = 30.0


class Command(BaseCommand):
    """Stores all files in one transaction; with it, tasks are sent or none is."""

    help = __doc__

    def add_arguments(self, parser: Any) -> None:
        """Take files."""
        parser.add_argument("files", nargs="+", type=Path)

    def handle(self, *args: Any, files: list[Path], **options: Any) -> None:
        """Store them, wait for the worker, and print what it has counted."""
        with transaction.atomic():
            documents = [
                Document.objects.create(title=file.name, text=file.read_text()) for file in files
            ]
            for document in documents:
                count_words.delay_on_commit(document.pk)
        transaction.on_commit(lambda: self.stdout.write(f"{len(documents)} stored"))
        for document in documents:
            self.stdout.write(f"{document.title}: {self._words(document)} words")

    def _words(self, document: Document) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            document.refresh_from_db()
            if document.words is not None:
                return int(document.words)
            time.sleep(0.05)
        raise CommandError(f"no worker has counted the words of {document.title}")
