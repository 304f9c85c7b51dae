"""`PropertyCalculator`: properties of a structure through ASE's interface."""

from pathlib import Path

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError
from segnn_ase.properties.files import load_properties
from segnn_ase.properties.model import PropertyModel


class PropertyCalculator(Calculator):
    """What a model of properties says, as `atoms.get_dipole_moment()`, `atoms.get_charges()` or, of any name,
    `atoms.calc.get_property("gap", atoms)`; in the form and the unit of the labels that it learned.

    model: a file, or a `PropertyModel`. Raises ConfigError, DeviceError, FileNotFoundError and ModelFileError at
    construction, StructureError for structures that cannot be evaluated.
    """

    def __init__(self, model: "str | Path | PropertyModel", *, device: str = "auto", **unknown):
        if unknown:
            raise ConfigError(f"unknown keyword {next(iter(unknown))!r} of PropertyCalculator; expected model, device")
        super().__init__()
        loaded = model if isinstance(model, PropertyModel) else load_properties(model)
        self.model = loaded.to(resolve_device(device)).eval()
        self.implemented_properties = [target.name for target in self.model.targets]

    def calculate(self, atoms: Atoms | None = None, properties=(), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        for name, value in self.model.predict(self.atoms).items():
            self.results[name] = value.item() if value.ndim == 0 else value
