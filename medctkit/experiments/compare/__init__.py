"""Many ways to adapt, each with its own seeds and learning rates, compared."""

__all__ = []
