"""Density functional theory of molecules with PySCF as an ASE calculator, whose forces belong to its energy."""

from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.units import Bohr, Hartree


class MoleculeDFT(Calculator):
    """Energy (eV) and forces (eV/Å) of a molecule; charge in e.

    Raises CalculationFailed where the density does not converge.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 - ASE's interface

    def __init__(
        self, xc: str = "pbe", basis: str = "def2-svp", charge: int = 0, multiplicity: int = 1, density_fit: bool = True
    ):
        super().__init__()
        self.parameters = {"xc": xc, "basis": basis, "charge": charge, "density_fit": density_fit}
        self.parameters["spin"] = multiplicity - 1  # unpaired electrons, as PySCF counts

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        from pyscf import dft, gto

        super().calculate(atoms, properties, system_changes)
        p = self.parameters
        geometry = list(zip(self.atoms.symbols, self.atoms.positions.tolist(), strict=True))
        mol = gto.M(atom=geometry, basis=p["basis"], charge=p["charge"], spin=p["spin"], verbose=0)
        method = (dft.UKS if p["spin"] else dft.RKS)(mol, xc=p["xc"])
        if p["density_fit"]:
            method = method.density_fit()
        energy = method.kernel()
        if not method.converged:
            raise CalculationFailed(f"the density of PySCF did not converge within {method.max_cycle} cycles")
        self.results = {"energy": float(energy) * Hartree}
        if "forces" in properties:
            gradient = method.nuc_grad_method()
            gradient.grid_response = True  # the grid moves with the atoms
            self.results["forces"] = -gradient.kernel() * Hartree / Bohr
