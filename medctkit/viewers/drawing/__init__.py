"""What the viewers draw with."""

__all__ = []
