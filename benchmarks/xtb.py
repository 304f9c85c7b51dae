"""Labels by GFN2-xTB (pip install tblite), in fields and of ions, for benchmarks that make their own frames."""

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.units import Bohr, Hartree

ATOMIC_FIELD = Hartree / Bohr  # V/Å in one atomic unit of a field


def calculated(atoms: Atoms, field: np.ndarray | None = None, charge: int = 0):
    """tblite's result, in atomic units, the field too; ions with an odd number of electrons have one unpaired."""
    from tblite.interface import Calculator as Xtb
    from tblite.library import ffi

    unpaired = (int(atoms.numbers.sum()) - charge) % 2
    calculator = Xtb("GFN2-xTB", atoms.numbers, atoms.positions / Bohr, charge=charge, uhf=unpaired)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.01)
    if field is not None:  # its wrapper takes no array
        calculator.add("electric-field", ffi.new("double[3]", np.asarray(field).tolist()))
    return calculator.singlepoint()


class Xtb(Calculator):
    """Energies and forces for dynamics."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        found = calculated(atoms)
        forces = -found.get("gradient") * Hartree / Bohr
        self.results = {"energy": float(found.get("energy")) * Hartree, "forces": forces}


def sampled(start: Atoms, count: int, *, kelvin: float, seed: int, every: int = 20) -> list[Atoms]:
    """Structures of a molecule along Langevin dynamics, `every` so many femtoseconds, each turned at random."""
    rng, atoms, found = np.random.default_rng(seed), start.copy(), []
    atoms.calc = Xtb()
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=rng)
    dynamics = Langevin(atoms, units.fs, temperature_K=kelvin, friction=0.01 / units.fs, rng=rng)
    dynamics.run(10 * every)
    for _ in range(count):
        dynamics.run(every)
        frame = Atoms(atoms.numbers, atoms.positions)
        frame.rotate(rng.uniform(0, 360), rng.normal(size=3))
        found.append(frame)
    return found
