"""Vocabularies and chat templates, as values."""
