"""One address: POST a text, and its words are counted."""

from django.urls import path

from documents import views

urlpatterns = [path("documents/", views.add)]
