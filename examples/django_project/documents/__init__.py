"""Texts, whose words are counted by tasks."""
