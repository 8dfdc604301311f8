"""From adapter to clinic: one base with the adapters of many hospitals."""

from medctkit.deploy.bank import AdapterBank

__all__ = ["AdapterBank"]
