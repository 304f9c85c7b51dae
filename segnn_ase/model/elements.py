"""What a potential knows of its elements, as tensors: the way from the network's epsilon to energies."""

from typing import NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from segnn_ase.base.errors import ConfigError, StructureError


class Elements(NamedTuple):
    """Constants of the elements of a potential, as they were when this was made; one entry each, where not said."""

    symbols: tuple[str, ...]
    index: Tensor  # (119,) species of an atomic number, -1 for others
    reference: Tensor  # E0, eV, float64
    scale: Tensor  # eV, float64
    isolated: Tensor  # epsilon of one lonely atom
    radii: Tensor  # (n, n) Å, core radii
    repels: bool  # whether there is core repulsion

    @property
    def core(self) -> Tensor | None:
        return self.radii if self.repels else None

    def kinds(self, numbers: Tensor) -> Tensor:
        """Species (N,) of atomic numbers (N,). Raises ValueError for those that are none of the potential's."""
        kind = self.index[numbers]
        if numbers.device.type == "cpu" and len(kind) and int(kind.min()) < 0:
            raise ValueError(f"numbers has elements that are not of {list(self.symbols)}")
        return kind

    def energies(self, kind: Tensor, epsilon: Tensor) -> Tensor:
        """E0 + scale (epsilon - isolated), (N,) eV, float64, from epsilon (N,)."""
        return self.reference[kind] + self.scale[kind] * (epsilon - self.isolated[kind]).double()


MORE_ELEMENTS = "Train one, or fine-tune this one, on data that have that element."


def check_elements(
    symbols: list[str], species: list[int], numbers: np.ndarray, *, model: str = "potential", then: str = MORE_ELEMENTS
) -> None:
    """Raise StructureError naming the first atom whose element the potential, or another model, does not know."""
    if set(species).issuperset(numbers.tolist()):
        return
    atom = int(np.flatnonzero(~np.isin(numbers, species))[0])
    if not 0 <= numbers[atom] < len(chemical_symbols):
        raise StructureError(f"atom {atom} has the atomic number {numbers[atom]}; expected an element")
    raise StructureError(
        f"atom {atom} is {chemical_symbols[numbers[atom]]}, which this {model} does not know; "
        f"it was trained for {', '.join(symbols)}. {then}"
    )


def parse_species(symbols: list[str]) -> list[int]:
    """Atomic numbers of chemical symbols. Raises ConfigError naming what is not an element."""
    wrong = [s for s in symbols if s not in atomic_numbers]
    if wrong:
        raise ConfigError(f"species has {wrong}; expected chemical symbols such as 'H' or 'Si'")
    return [atomic_numbers[s] for s in symbols]


def species_index(species: list[int]) -> Tensor:
    """(119,) the place of an atomic number among the species, -1 for others."""
    index = torch.full((119,), -1, dtype=torch.long)
    index[torch.tensor(species)] = torch.arange(len(species))
    return index
