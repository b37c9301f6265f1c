"""The table of documents."""

from django.db import migrations, models


class Migration(migrations.Migration):
    """Makes it."""

    initial = True
    operations = [  # noqa: RUF012  # as Django writes it
        migrations.CreateModel(
            name="Document",
            fields=[
                ("id", models.BigAutoField(primary_key=True)),
                ("title", models.CharField(max_length=200)),
                ("text", models.TextField()),
                ("words", models.IntegerField(null=True)),
            ],
        )
    ]
