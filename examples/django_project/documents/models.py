"""What is stored."""

from django.db import models


class Document(models.Model):
    """A text, and how many words it has once that is known."""

    title = models.CharField(max_length=200)
    text = models.TextField()
    words = models.IntegerField(null=True)

    def __str__(self) -> str:
        return str(self.title)
