"""Checks of a potential on the user's own structure."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["verify"]
__getattr__ = lazy_names(__name__, {"verify": "run"})
