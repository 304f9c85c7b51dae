"""`SEGNNModel`, a potential for torch-sim; see `segnn_ase.engines.torchsim`."""

from segnn_ase.base.lazy import lazy_names

__getattr__ = lazy_names("segnn_ase", {"SEGNNModel": "engines.torchsim"})
