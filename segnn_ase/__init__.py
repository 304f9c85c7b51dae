"""SEGNN interatomic potentials for ASE."""

from segnn_ase.base.lazy import lazy_names

__version__ = "0.1.0"
__all__ = [
    "OnTheFlyCalculator",
    "Potential",
    "SEGNNCalculator",
    "load_potential",
    "run_md",
    "save_potential",
    "shipped_potentials",
]
__getattr__ = lazy_names(
    __name__,
    {
        "OnTheFlyCalculator": "learn.on_the_fly",
        "Potential": "model.potential",
        "SEGNNCalculator": "calculator",
        "load_potential": "store.model_file",
        "run_md": "md.run",
        "save_potential": "store.model_file",
        "shipped_potentials": "store.shipped",
    },
)
