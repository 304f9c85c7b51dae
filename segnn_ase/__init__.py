"""SEGNN interatomic potentials for ASE."""

__version__ = "0.1.0"
__all__ = ["Potential", "SEGNNCalculator", "load_potential", "run_md", "save_potential", "shipped_potentials"]

_HOME = {
    "Potential": "potential",
    "SEGNNCalculator": "calculator",
    "load_potential": "checkpoint",
    "run_md": "md",
    "save_potential": "checkpoint",
    "shipped_potentials": "checkpoint",
}


def __getattr__(name: str):
    """Import on first use: `import segnn_ase` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'segnn_ase' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"segnn_ase.{_HOME[name]}"), name)
