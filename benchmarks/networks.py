"""Peers that are message-passing networks, with random weights and the sizes of their papers and tutorials."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ELEMENTS = [1, 6, 8, 14]
SYMBOLS = ["H", "C", "O", "Si"]
CUTOFF = 5.0  # Å
NEIGHBORS = 40.0


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
        type_names=SYMBOLS,
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


def sevennet(dtype: str, device: str):
    """SevenNet as its settings are where none are given: 3 layers, l = 1, 32 features (sevenn 0.13, eager); its
    calculator turns all input to float32."""
    import copy

    import sevenn._keys as keys
    import torch
    from sevenn import _const
    from sevenn.calculator import SevenNetCalculator
    from sevenn.model_build import build_E3_equivariant_model

    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    config = copy.deepcopy(_const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG)
    config |= {
        keys.CUTOFF: CUTOFF,
        keys.NUM_SPECIES: len(ELEMENTS),
        keys.CHEMICAL_SPECIES: SYMBOLS,
        keys.CHEMICAL_SPECIES_BY_ATOMIC_NUMBER: ELEMENTS,
        keys.TYPE_MAP: {z: i for i, z in enumerate(ELEMENTS)},
        keys.SHIFT: 0.0,
        keys.SCALE: 1.0,
        keys.RADIAL_BASIS: {"radial_basis_name": "bessel", "bessel_basis_num": 8},
        keys.CUTOFF_FUNCTION: {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 6},
    }
    config[keys.CONV_DENOMINATOR] = [NEIGHBORS**0.5] * config[keys.NUM_CONVOLUTION]
    return SevenNetCalculator(build_E3_equivariant_model(config), file_type="model_instance", device=device)


def random_mace(dtype: str):
    """MACE with 64 scalar channels, l = 3 harmonics, body order 4."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # its e3nn stores more than weights
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules

    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    blocks = modules.interaction_classes
    return modules.ScaleShiftMACE(
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


def mace_small(dtype: str, device: str, **options):
    """`random_mace` by its own calculator (mace-torch 0.3, eager)."""
    model = random_mace(dtype)
    from mace.calculators import MACECalculator

    return MACECalculator(models=[model], device=device, default_dtype=dtype, **options)


def mace_cuequivariance(dtype: str, device: str):
    """The same with the kernels of cuEquivariance (cuequivariance-torch, -ops-torch-cu12 or -cu13)."""
    return mace_small(dtype, device, enable_cueq=True)


def symmetrix(dtype: str, device: str):
    """The same in Symmetrix' C++, as symmetrix-xl 0.1 still has it: float64, splines for each pair of elements."""
    return _symmetrix("pair-splines", dtype="float64", use_kokkos=False, streamed_edges="materialized")


def symmetrix_xl(dtype: str, device: str):
    """The same in the code that symmetrix-xl 0.1 generates and compiles for the model."""
    return _symmetrix("compact", dtype=dtype, streamed_edges="direct", execution_profile="speed")


def _symmetrix(radial: str, **options):
    """A calculator for a model that Symmetrix' own converter has written, in a process that has PyTorch."""
    os.environ.setdefault("SYMMETRIX_BACKEND", "cpu-avx512" if _has_avx512() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mace.json")
        command = [sys.executable, __file__, radial, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"the model was not converted: {done.stderr.strip().splitlines()[-1]}")
        from symmetrix import Symmetrix

        return Symmetrix(str(path), **options)


def _has_avx512() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512f" in info.read_text()


def _convert(radial: str, path: str) -> None:
    model = random_mace("float64")
    import torch
    from symmetrix.cli.extract_mace import main

    torch.save(model, f"{path}.model")
    species = [] if radial == "compact" else ["--atomic-numbers", *map(str, ELEMENTS)]
    main(["--model", f"{path}.model", "--output", path, "--radial-format", radial, *species])


def gfn2_xtb(precision: str, device: str):
    """A reference of `segnn learn`: no network, but asked for the same."""
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0)


def sevennet_l3i5(precision: str, device: str):
    """The universal potential, with the weights in its wheel."""
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator("7net-l3i5", device=device)


NETWORKS = {
    "gfn2-xtb": gfn2_xtb,
    "sevennet-l3i5": sevennet_l3i5,
    "nequip-S": nequip_small,
    "sevennet": sevennet,
    "mace-64x0e": mace_small,
    "mace-64x0e-cueq": mace_cuequivariance,
    "symmetrix-64x0e": symmetrix,
    "symmetrix-xl-64x0e": symmetrix_xl,
}

if __name__ == "__main__":
    _convert(*sys.argv[1:])
