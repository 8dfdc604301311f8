"""Packages that only some commands need, and how to get them."""

from importlib import import_module


def require(extra: str, *names: str) -> None:
    """Before long work begins: are these modules installed, which the `extra` of the package brings?

    Raises:
        ModuleNotFoundError: one is not there; says the command that installs it.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError:
            said = f"this needs {name}, which is not installed: pip install 'medctkit[{extra}]'"
            raise ModuleNotFoundError(said, name=name) from None
