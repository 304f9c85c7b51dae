"""Small random potentials, seeded and calibrated, on the species of `systems`."""

import pytest
import torch

from helpers.systems import CUTOFF, NAMED, SPECIES, copper, ethanol, rattled
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import PRESETS, model_config
from segnn_ase.structure.graph import collate, graph_from_atoms

STEERABLE = {"hidden_irreps": "8x0e+8x1o+8x2e"}
VARIANTS = {  # name: (preset, replaced settings)
    "segnn": ("segnn", STEERABLE),
    "fast": ("fast", {"hidden_irreps": "8x0e+8x1o"}),
    "accurate": ("accurate", STEERABLE),
    "tfn": ("tfn", STEERABLE),
    "egnn": ("egnn", {"hidden_irreps": "16x0e"}),
    "schnet": ("schnet", {"hidden_irreps": "16x0e"}),
    "uneven": ("segnn", {"hidden_irreps": "12x0e+6x1o+3x2e", "lmax_attr": 2}),
    "parities": ("segnn", {"hidden_irreps": "8x0e+4x0o+4x1e+4x1o", "lmax_attr": 2}),
    "sparse": ("fast", {"hidden_irreps": "8x0e+8x1o", "density_weighting": True}),
    "pointconv": ("tfn", {**STEERABLE, "density_weighting": True}),
    "bounded": ("segnn", {**STEERABLE, "bound": 0.5}),
    "unbounded": ("segnn", {**STEERABLE, "bound": 0.0, "power_scale": 1.0}),
    "coreless": ("segnn", {**STEERABLE, "core_repulsion": False}),
    "segnn2022": ("segnn2022", STEERABLE),
    "default": ("segnn", {}),
}
assert set(PRESETS) <= set(VARIANTS)

LAYERS_ONLY = ("segnn2022", "sparse", "pointconv")  # which the compiled network does not know

ODD = {  # settings that the presets do not reach
    "odd_channels": {"hidden_irreps": "5x0e+5x1o"},
    "high_degree": {"hidden_irreps": "9x0e+9x1o+9x3o", "interactions": 1},
    "all_degrees": {"hidden_irreps": "9x0e+9x1o+9x2e+9x3o", "interactions": 1},  # compiling it takes minutes
    "both_parities": {"hidden_irreps": "6x0e+6x0o+6x1e+6x1o", "lmax_attr": 2},
    "three_interactions": {"hidden_irreps": "17x0e+17x1o", "interactions": 3, "body_order": 2},
    "few_attributes": {"hidden_irreps": "8x0e+8x1o+8x2e", "lmax_attr": 1},
}

ODD_CASES = [pytest.param(name, marks=pytest.mark.proof) if name == "all_degrees" else name for name in ODD]

# of each kind of network one in single precision, the default with the many channels that users have; the rest of the
# product costs a set of compiled kernels each
IN_FLOAT32, NOT_IN_FLOAT64 = ("fast", "schnet", "egnn", "default"), ("default",)


def in_two_precisions(variants) -> list:
    """Pairs of a variant and a dtype: each variant, and either dtype with every kind of network; others are proofs."""

    def case(variant: str, name: str):
        usual = variant in IN_FLOAT32 if name == "float32" else variant not in NOT_IN_FLOAT64
        marks = () if usual else pytest.mark.proof
        return pytest.param(variant, getattr(torch, name), id=f"{variant}-{name}", marks=marks)

    return [case(variant, name) for variant in variants for name in ("float64", "float32")]


TINY = {"hidden_irreps": "4x0e+4x1o", "lmax_attr": 1, "cutoff": 3.5, "n_radial": 4, "radial_hidden": (8,)}
REFERENCES = {1: -0.5, 6: -1.25, 8: 0.75, 29: 2.0}  # eV, of `SPECIES`


def everything_at_once():
    """All named systems as one graph."""
    return collate([graph_from_atoms(build(), CUTOFF) for build in NAMED.values()])


def build_potential(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Potential:
    """A new calibrated potential with random weights, energies of O(1) eV an atom and reference energies."""
    preset, settings = VARIANTS[variant]
    small = {} if variant == "default" else {"radial_hidden": (16,)}
    config = model_config(preset, cutoff=CUTOFF, **settings, **small)
    potential = Potential(config, SPECIES, reference_energies=list(REFERENCES.values()), seed=seed).double()
    potential.calibrate(everything_at_once())
    return potential.to(dtype).eval()


def odd_potential(name: str) -> Potential:
    """One of `ODD`, in float64, no bias of which is zero."""
    potential = Potential(
        model_config(cutoff=CUTOFF, radial_hidden=(16,), **ODD[name]),
        SPECIES,
        reference_energies=list(REFERENCES.values()),
        scales=[1.0, 2.0, 0.5, 1.5],
    )
    potential.calibrate(everything_at_once())
    generator = torch.Generator().manual_seed(0)
    for weight in potential.parameters():  # biases too
        if not bool(weight.any()):
            torch.nn.init.normal_(weight, generator=generator)
    return potential.double().eval()


def tiny_potential(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> Potential:
    """The smallest one with every kind of weight, calibrated on a molecule and a crystal."""
    config = model_config(**{**TINY, **settings})
    references = list(REFERENCES.values())
    potential = Potential(config, SPECIES, reference_energies=references, scales=[0.8] * 4, seed=seed)
    potential.calibrate(collate([graph_from_atoms(atoms, config.cutoff) for atoms in (ethanol(), rattled(copper()))]))
    return potential.to(dtype).eval()


def uncalibrated_potential(dtype: torch.dtype = torch.float32, **settings) -> Potential:
    """The tiny one for files: three species, and reference energies that no short decimal number is."""
    config = model_config(**{**TINY, **settings})
    potential = Potential(config, [1, 8, 29], reference_energies=[-13.6, 0.1, 1 / 3], scales=[0.7] * 3)
    return potential.to(dtype).eval()


METADATA = {"training": {"epochs": 3, "freeze": [], "patience": None}, "errors": {"valid": {"energy_rmse": 0.001}}}
