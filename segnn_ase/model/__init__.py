"""The network and the potential in plain PyTorch."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["SEGNN", "ModelConfig", "Potential", "SteerableHead"]
__getattr__ = lazy_names(
    __name__, {"SEGNN": "network", "SteerableHead": "published", "Potential": "potential", "ModelConfig": "settings"}
)
