"""The tasks of this app; `autodiscover_tasks` finds them."""

import logging
from collections import Counter

from celery import shared_task

from documents.models import Document
from isolated_tasks import IsolatedTask

logger = logging.getLogger(__name__)


@shared_task(base=IsolatedTask)
def count_words(document_id: int) -> int:
    """Count the words of one document, in a fresh process."""
    document = Document.objects.get(pk=document_id)
    document.words = len(document.text.split())
    document.save(update_fields=["words"])
    logger.info("%s has %d words", document, document.words)
    return int(document.words)


@shared_task(base=IsolatedTask, batch_size=50)
def most_common(document_id: int) -> str:
    """The word that a document has most often; one process, and one connection, for 50 calls."""
    document = Document.objects.get(pk=document_id)
    counted = Counter(document.text.lower().split()).most_common(1)
    return counted[0][0] if counted else ""
