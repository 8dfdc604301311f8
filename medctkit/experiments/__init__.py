"""Adapt, measure, localise, compare, audit, report."""

__all__ = []
