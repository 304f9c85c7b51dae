"""Models of properties on labelled files, and what they are, in words."""

from pathlib import Path

from ase.data import chemical_symbols

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import expect
from segnn_ase.data.batches import cheapest
from segnn_ase.data.frames import as_paths, check_geometries, check_species
from segnn_ase.properties.files import load_properties, read_properties
from segnn_ase.properties.goal import errors_of_properties, layers_for, property_residuals, without_loss
from segnn_ase.properties.labels import check_forms, read_labelled
from segnn_ase.properties.learning import item_of
from segnn_ase.properties.targets import UNKNOWN
from segnn_ase.train.settings import LoopConfig


def evaluate_properties(model: "str | Path", paths: "str | Path | list", *, device: str = "auto") -> dict[str, dict]:
    """Errors of components on labelled files, one entry per file: {"test.xyz": {"dipole_rmse": …, "dipole_mae": …}}.

    Raises what `read_labelled` raises, DataError for unknown elements and labels of another form.
    """
    paths = as_paths(paths)
    expect(bool(paths), "paths", paths, "at least one")
    loaded, errors = load_properties(model, device=resolve_device(device)), {}
    for path in paths:
        irreps = {target.name: target.irreps for target in loaded.targets}
        frames = read_labelled([path], list(irreps), irreps, every=False)
        check_geometries(frames)
        check_species(frames, loaded.species, path, **UNKNOWN)
        check_forms(frames, loaded.targets)
        items = [item_of(frame, loaded.targets, loaded.cutoff) for frame in frames]
        operations = layers_for(loaded, cheapest(items))
        errors[path] = without_loss(errors_of_properties(property_residuals(loaded, items, LoopConfig(), operations)))
    return errors


def describe_properties(path: "str | Path") -> str:
    """Elements, properties, settings, size and measured errors."""
    model, metadata = read_properties(path)
    config = model.config
    lines = [f"elements    {' '.join(chemical_symbols[z] for z in model.species)}"]
    for target in model.targets:
        of = {"free": "of atoms", "zero": "of atoms, with a sum of 0"}.get(
            target.pooling, f"{target.pooling} over atoms"
        )
        lines.append(f"property    {target.name}: {target.irreps}, {of}, in the unit of the labels")
    lines += [
        f"irreps      {config.hidden_irreps}, attributes to l = {config.lmax_attr}, {config.interactions} interactions",
        f"cutoff      {config.cutoff} Å",
        f"parameters  {sum(p.numel() for p in model.parameters())}, {model.dtype}".replace("torch.", ""),
    ]
    for name, errors in metadata.get("errors", {}).items():
        lines.append(f"errors      {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in errors.items() if v is not None))
    return "\n".join(lines)
