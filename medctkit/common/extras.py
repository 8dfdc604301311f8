"""Packages that only some commands need, and how to get them."""

from importlib import import_module


def require(extra: str, *names: str) -> None:
    """Before long work begins: is what it needs installed?

    Args:
        extra: of the package, which brings them.
        names: modules.

    Raises:
        ImportError: one is not there; says the command that installs it.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError:
            raise ImportError(
                f"this needs {name}, which is not installed: pip install 'medctkit[{extra}]'", name=name
            ) from None
