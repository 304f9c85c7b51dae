"""A potential of one's own from a structure and any reference that labels frames: `segnn learn` and `segnn select`."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["LearnConfig", "OnTheFlyCalculator", "learn", "select_frames"]
__getattr__ = lazy_names(
    __name__,
    {"LearnConfig": "settings", "OnTheFlyCalculator": "on_the_fly", "learn": "loop", "select_frames": "selection"},
)
