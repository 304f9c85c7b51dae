"""A potential for i-PI: all beads of a path integral in one call.

In an input of i-PI, in the same process:

    <ffdirect name='segnn'>
      <pes> custom </pes>
      <pes_path> ... </pes_path>              <!-- of this file: python -m segnn_ase.engines.ipi_driver prints it -->
      <parameters> {template: water.xyz, model: water-pbe0, pbc: True} </parameters>
      <batch_size> 8 </batch_size>            <!-- the number of beads -->
    </ffdirect>

or as a process of its own behind a socket: `i-pi-driver-py -u -a segnn -m custom -P PATH -o
water.xyz,water-pbe0,pbc=True`.

i-PI: Litman et al., J. Chem. Phys. 161, 062504 (2024).
"""

import json
import warnings
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read

from segnn_ase.base.errors import ConfigError, StructureError, expect
from segnn_ase.calculator import SEGNNCalculator

__DRIVER_NAME__ = "segnn"
__DRIVER_CLASS__ = "SEGNNDriver"
_PBC = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_OF_IPI = ("verbose", "verbosity")  # what it tells every driver
Answer = tuple[float, np.ndarray, np.ndarray, str]


class SEGNNDriver:
    """Energies, forces and virials in atomic units.

    Args: template: a file that ASE reads, with the atoms in i-PI's order, and what the potential is told of them;
    model: a file or the name of a shipped potential; pbc: whether they are periodic, in all directions or none; needed
    where the template has no cell, as of i-PI's own xyz files ASE reads none; settings: those of SEGNNCalculator.
    Raises ConfigError for settings that do not exist.
    """

    def __init__(self, template: str, model: str, *, pbc: "bool | str | None" = None, **settings: Any):
        atoms = read(template)
        if not isinstance(atoms, Atoms):
            raise ConfigError(f"template is {template!r}, of which ASE makes no structure; expected a file with one")
        known = pbc is not None or atoms.pbc.any() or atoms.cell.rank > 0
        expect(known, "pbc", pbc, f"True or False, as {template} has no cell that would tell")
        if pbc is not None:
            expect(str(pbc).lower() in _PBC, "pbc", pbc, "True or False")
            atoms.pbc = _PBC[str(pbc).lower()]
        if atoms.pbc.any() and not atoms.pbc.all():
            text = f"pbc of {template} is {atoms.pbc.tolist()}: the virial is zero, so that no barostat may be used"
            warnings.warn(text, UserWarning, stacklevel=2)
        self._template = atoms
        self._calculator = SEGNNCalculator(model, **{k: v for k, v in settings.items() if k not in _OF_IPI})

    def __call__(self, cell: "np.ndarray | list[np.ndarray]", pos: "np.ndarray | list[np.ndarray]") -> Any:
        """Of one structure, or of a list of them, side by side.

        Args: cell (3, 3), Bohr, whose columns are lattice vectors; pos (n, 3), Bohr.
        Returns for each the energy (Hartree), forces (n, 3; Hartree/Bohr), virial (3, 3; Hartree; zero where not all
        directions are periodic) and a string, JSON of "outside": in which ways it is outside of the training data.
        Raises StructureError where the numbers of atoms differ.
        """
        if isinstance(cell, list):
            return self._answers(cell, list(pos))
        return self._answers([cell], [pos])[0]

    def _answers(self, cells: list, positions: list) -> list[Answer]:
        from ipi.utils.units import unit_to_internal, unit_to_user

        structures = []
        for cell, pos in zip(cells, positions, strict=True):
            atoms = self._template.copy()
            if np.shape(pos) != atoms.positions.shape:
                raise StructureError(f"i-PI has {len(pos)} atoms; expected {len(atoms)}, as the template has")
            atoms.set_cell(unit_to_user("length", "angstrom", np.transpose(cell)))
            atoms.positions[:] = unit_to_user("length", "angstrom", pos)
            structures.append(atoms)
        answers = []
        results = self._calculator.evaluate(structures, ("energy", "forces", "stress"))
        for atoms, found in zip(structures, results, strict=True):
            virial = np.zeros((3, 3))
            if atoms.pbc.all():
                virial = -atoms.get_volume() * found["stress"][[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
            ways = list(dict.fromkeys(way.kind for way in found.get("outside_domain", ())))
            answers.append(
                (
                    unit_to_internal("energy", "electronvolt", found["energy"]),
                    unit_to_internal("force", "ev/ang", found["forces"]),
                    unit_to_internal("energy", "electronvolt", virial),
                    json.dumps({"outside": ways}),  # always: i-PI wants the same names of all beads
                )
            )
        return answers


if __name__ == "__main__":
    print(__file__)
