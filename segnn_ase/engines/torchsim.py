"""A potential for torch-sim: many systems side by side.

torch-sim: Cohen et al., AI for Science 1, 025003 (2025); `pip install 'segnn-ase[torch-sim]'`.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.base.devices import resolve_dtype
from segnn_ase.base.errors import DomainWarning, MissingExtraError, StructureError, expect, level_of_caller
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.model.potential import Potential

try:
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise MissingExtraError("segnn_ase.torchsim needs torch-sim: pip install 'segnn-ase[torch-sim]'") from error

NEEDED = ("positions", "cell", "atomic_numbers", "system_idx", "pbc")
TOLD = ("charge", "spin")  # of each system, which some versions of torch-sim keep in a state


class SEGNNModel(ModelInterface):
    """Energies, forces and stresses of a state, as `SEGNNCalculator` has them, for torch-sim's runners.

    model: a file, the name of a shipped potential, a `Potential` or a list of them. dtype: of states and results; the
    network itself runs in the precision of its file, or in `precision`. told: what the potential is told of every
    system, as {"external_field": (0, 0, 0.01)}; total charge and multiplicity come from the state, where it has them.
    settings: those of `SEGNNCalculator`. Raises what that raises, and MissingExtraError without torch-sim.

    `forward(state)` returns energy (n_systems,), eV; forces (n_atoms, 3), eV/Å; stress (n_systems, 3, 3), eV/Å^3, zero
    of molecules; outside (n_systems,), whether a system is outside the training data. A system that has no energy, as
    where two atoms meet, has NaN and a DomainWarning, and the others go on. Of slabs no stress is defined: it
    raises ConfigError unless compute_stress is false. (torch-sim 0.3 knows no slabs: it takes them for molecules.)
    """

    def __init__(
        self,
        model: "str | Path | Potential | list",
        *,
        device: "str | torch.device" = "auto",
        dtype: torch.dtype = torch.float64,
        compute_forces: bool = True,
        compute_stress: bool = True,
        precision: "str | torch.dtype | None" = None,
        told: dict[str, Any] | None = None,
        **settings: Any,
    ):
        super().__init__()
        expect(isinstance(dtype, torch.dtype), "dtype", dtype, "torch.float64 or torch.float32")
        self._dtype = resolve_dtype(dtype)
        self._calculator = SEGNNCalculator(model, device=str(device), dtype=precision, **settings)
        of_systems = [cue.name for cue in self._calculator.cues if cue.per == "graph"]
        of_systems += [name for name in self._calculator.told_names if name == "charge" and name not in of_systems]
        for name in told or {}:
            expect(
                name in of_systems, "told", name, f"what the potential is told of a system: {of_systems or 'nothing'}"
            )
        self._device, self._told = self._calculator.device, dict(told or {})
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        # measured on the CPU: 26 to 38 kB an atom of the default network, at densities from 1 to 2.3; pairs are passed
        # through in parts. On a GPU they are all there
        self._memory_scales_with = "n_atoms" if self._device.type == "cpu" else "n_atoms_x_density"

    @property
    def compute_forces(self) -> bool:
        """Whether forces are among the results."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    @property
    def compute_stress(self) -> bool:
        """Whether stresses are among the results."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    def forward(self, state, **_) -> dict[str, Tensor]:
        """The results of a SimState or of a dictionary of its tensors, all systems side by side."""
        systems = structures_of(vars(state) if not isinstance(state, dict) else state, self._told)
        wanted = {"forces": self._compute_forces, "stress": self._compute_stress}
        names = ["energy", *(name for name, asked in wanted.items() if asked)]
        pbc = systems[0].pbc
        slab = self._compute_stress and pbc.any() and not pbc.all()
        expect(not slab, "compute_stress", True, f"false where pbc is {pbc.tolist()}: such systems have no stress")
        results = self._evaluated(systems, names)
        found = {"energy": self._tensor([one["energy"] for one in results])}
        if self._compute_forces:
            found["forces"] = self._tensor(np.concatenate([one["forces"] for one in results]))
        if self._compute_stress:
            whole = [one.get("stress", np.zeros(6))[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]] for one in results]
            found["stress"] = self._tensor(np.stack(whole))
        found["outside"] = torch.tensor([bool(one.get("outside_domain")) for one in results], device=self._device)
        return found

    def _evaluated(self, systems: list[Atoms], names: list[str]) -> list[dict[str, Any]]:
        """The results of each; NaN of those that cannot be evaluated, as where atoms meet, so that the others go on."""
        try:
            return self._calculator.evaluate(systems, names)
        except StructureError as error:
            if len(systems) > 1:
                return [one for system in systems for one in self._evaluated([system], names)]
            text = f"a system of {systems[0].symbols} has no energy, which is NaN: {error}"
            warnings.warn(text, DomainWarning, stacklevel=level_of_caller())
            nothing = {"energy": np.nan, "forces": np.full((len(systems[0]), 3), np.nan), "stress": np.full(6, np.nan)}
            return [{**nothing, "outside_domain": True}]

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=self._dtype, device=self._device)


def structures_of(state: dict[str, Any], told: dict[str, Any]) -> list[Atoms]:
    """The systems of a state, whose cells have their vectors as columns; told: beside each of them.

    Raises ConfigError for a dictionary that is no state.
    """
    arrays = {k: x.detach().cpu().numpy() for k, x in state.items() if isinstance(x, Tensor)}
    missing = [name for name in NEEDED if state.get(name) is None]
    expect(not missing, "state", sorted(state), f"{', '.join(NEEDED)}, without which it is none")
    index, cells = arrays["system_idx"], arrays["cell"].reshape(-1, 3, 3)
    sizes = np.bincount(index, minlength=len(cells))
    expect(bool(len(index)) and bool(sizes.all()), "state", sizes.tolist(), "atoms in each system")
    expect(bool((np.diff(index) >= 0).all()), "system_idx", index, "the atoms of one system after those of another")
    pbc = np.broadcast_to(np.asarray(arrays.get("pbc", state["pbc"]), dtype=bool), 3)
    parts = zip(
        *(np.split(arrays[name], np.cumsum(sizes)[:-1]) for name in ("atomic_numbers", "positions")), strict=True
    )
    systems = []
    for n, ((numbers, positions), cell) in enumerate(zip(parts, cells, strict=True)):
        # versions of torch-sim that have these fill them with zeros where nobody says anything
        own = {name: arrays[name][n].item() for name in TOLD if name in arrays and arrays[name][n] != 0}
        systems.append(Atoms(numbers, positions, cell=cell.T, pbc=pbc, info={**told, **own}))
    return systems
