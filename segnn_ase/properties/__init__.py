"""Properties of structures and atoms, invariant or steerable: dipoles, polarizabilities, charges, gaps, shieldings."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["PropertyCalculator", "PropertyModel", "PropertyTraining", "load_properties", "train_properties"]
__getattr__ = lazy_names(
    __name__,
    {
        "PropertyCalculator": "calculator",
        "PropertyModel": "model",
        "PropertyTraining": "settings",
        "load_properties": "files",
        "train_properties": "learning",
    },
)
