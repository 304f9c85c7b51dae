"""Calculators to be timed, by name: our presets in every mode, and peers in environments of their own.

Weights are random: the cost does not depend on them. Peers have the sizes of their papers and tutorials.
"""

import warnings

ELEMENTS = [1, 6, 8, 14]
CUTOFF = 5.0  # Å
NEIGHBORS = 40.0


def build(name: str, dtype: str, device: str):
    """An ASE calculator: `<preset>`, `<preset>:layers` (no tables), `<preset>:torch` (no compiled code), a peer, or a
    model file or shipped potential with the same endings."""
    if name in PEERS:
        warnings.filterwarnings("ignore")
        return PEERS[name](dtype, device)
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


def nequip_small(dtype: str, device: str):
    """NequIP-S: 2 layers, l = 1, 128 then 64 features (nequip 0.19, eager)."""
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms, handle_chemical_species_map
    from nequip.model import NequIPGNNModel
    from nequip.nn import graph_model
    from nequip.utils.global_state import set_global_state

    set_global_state(allow_tf32=False)
    model = NequIPGNNModel(
        seed=0,
        model_dtype=dtype,
        r_max=CUTOFF,
        type_names=["H", "C", "O", "Si"],
        num_layers=2,
        l_max=1,
        parity=False,
        num_features=[128, 64],
        type_embed_num_features=32,
        avg_num_neighbors=NEIGHBORS,
        per_type_energy_scales=1.0,
        per_type_energy_shifts=0.0,
        compile_mode="eager",
    ).eval()
    types = model.metadata[graph_model.TYPE_NAMES_KEY].split(" ")
    species = handle_chemical_species_map(True, types)
    return NequIPCalculator(
        model.to(device), device, transforms=basic_transforms(model.metadata, CUTOFF, types, species)
    )


def mace_small(dtype: str, device: str):
    """MACE with 64 scalar channels, l = 3 harmonics, body order 4 (mace-torch 0.3, eager)."""
    import os

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # its e3nn stores more than weights
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    blocks = modules.interaction_classes
    model = modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        correlation=3,
        num_interactions=2,
        interaction_cls_first=blocks["RealAgnosticInteractionBlock"],
        interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
        hidden_irreps=o3.Irreps("64x0e"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        num_elements=len(ELEMENTS),
        atomic_numbers=ELEMENTS,
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=NEIGHBORS,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    return MACECalculator(models=[model], device=device, default_dtype=dtype)


PEERS = {"nequip-S": nequip_small, "mace-64x0e": mace_small}
