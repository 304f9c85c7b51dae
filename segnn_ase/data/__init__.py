"""Labelled frames: reading them, reference energies, batches."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["Frame", "LabelKeys", "read_frames", "reference_energies"]
__getattr__ = lazy_names(
    __name__,
    {"Frame": "frames", "read_frames": "frames", "LabelKeys": "labels", "reference_energies": "references"},
)
