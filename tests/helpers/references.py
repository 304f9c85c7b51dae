"""References for tests: calculators that a worker imports from here, and what may go wrong with them."""

import os
import time
from pathlib import Path

import numpy as np
from ase.calculators.emt import EMT


class Counting(EMT):
    """Writes down every structure that it computes, when it has."""

    def __init__(self, counts: str, shift: str = ""):
        super().__init__()
        self.counts, self.shift = counts, shift

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        if self.shift and Path(self.shift).exists():  # from now on it is another one
            self.results["energy"] += 1.0
            self.results["free_energy"] += 1.0
        line = " ".join(f"{x:.7f}" for x in self.atoms.positions.ravel())
        with open(self.counts, "a") as file:
            file.write(line + "\n")


class Moody(EMT):
    """What becomes of a structure stands in its first atom's height."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        mood = round(float(self.atoms.positions[0, 2]))
        print("a line that is no answer")
        if mood == 1:
            raise RuntimeError("the density did not converge")
        if mood == 2:
            time.sleep(3600)
        if mood == 3:
            os._exit(7)
        if mood == 4:
            self.results["energy"] = self.results["free_energy"] = float("nan")
        if mood == 5:
            self.results["forces"] = np.zeros((1, 3))
        if mood == 6:
            self.results["hoard"] = np.ones(10**9)  # 8 GB


class Colder(EMT):
    """With smeared electrons: the energy is not that of the forces."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] += 0.5


class OfCharge(EMT):
    """The energy is the charge that it is told."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = self.results["free_energy"] = self.atoms.info.get("charge", 0)


class Slow(EMT):
    """A label takes half a second."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        time.sleep(0.5)
        super().calculate(atoms, properties, system_changes)


class Stiffer(EMT):
    """Another level of theory."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        self.results = {name: 1.2 * value for name, value in self.results.items()}
