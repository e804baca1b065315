"""Builders of retrieval test sets from public texts."""
