"""Helpers that know nothing of CT: atomic writes, tables, words for messages, pages, provenance, processes."""

__all__: list[str] = []
