"""The reproduction report: claims, figures, page."""

__all__ = []
