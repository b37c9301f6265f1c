"""What the web processes do."""

from typing import Any

from django.db import transaction
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from documents.models import Document
from documents.tasks import count_words


@csrf_exempt
@require_POST
@transaction.atomic
def add(request: Any) -> JsonResponse:
    """Store a text, and have its words counted once it is there for others to see."""
    document = Document.objects.create(title=request.POST["title"], text=request.POST["text"])
    # With `delay` the task could begin before the row is committed, and not find it.
    count_words.delay_on_commit(document.pk)
    return JsonResponse({"id": document.pk})
