"""Helpers that know nothing of CT: atomic writes, tables, words for messages, provenance, processes."""

__all__ = []
