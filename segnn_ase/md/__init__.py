"""Molecular dynamics with ASE's integrators: runs that can be stopped, guarded and gone on with."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["MDConfig", "run_md"]
__getattr__ = lazy_names(__name__, {"MDConfig": "settings", "run_md": "run"})
