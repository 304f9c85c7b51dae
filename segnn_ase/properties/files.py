"""Files of models of properties: plain content, as those of potentials."""

import math
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols

from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.model.elements import parse_species
from segnn_ase.model.irreps import CONVENTION
from segnn_ase.properties.model import Constants, PropertyModel
from segnn_ase.properties.settings import check_name
from segnn_ase.properties.targets import POOLINGS, Target, checked_irreps, is_of_matrix
from segnn_ase.store.model_file import WRONG, check_weights, checked_metadata, load_weights, stored_config
from segnn_ase.store.shipped import find_model
from segnn_ase.store.tensors import load_form, load_tensors, save_tensors

PROPERTIES, LAYOUT = "segnn_ase properties", 1  # format and its version


def save_properties(path: "str | Path", model: PropertyModel, *, metadata: dict | None = None) -> None:
    """Write a model of properties with its provenance; metadata holds plain values."""
    content = {
        "format": PROPERTIES,
        "version": LAYOUT,
        "convention": CONVENTION,
        "config": model.config.model_dump(mode="json"),
        "species": [chemical_symbols[z] for z in model.species],
        "targets": [{**t._asdict(), "shape": list(t.shape)} for t in model.targets],
        "constants": [c._asdict() for c in model.constants],
        "weights": model.state_dict(),
        "metadata": metadata or {},
    }
    save_tensors(path, content)


def holds_properties(model: Any) -> bool:
    """Whether a file is a model of properties. Raises FileNotFoundError and ModelFileError."""
    return load_tensors(find_model(model)).get("format") == PROPERTIES


def load_properties(path: "str | Path", *, device: "str | torch.device" = "cpu") -> PropertyModel:
    """Load a model of properties, ready for evaluation. Raises FileNotFoundError, ModelFileError for other files."""
    return read_properties(path)[0].to(device)


def read_properties(path: "str | Path") -> tuple[PropertyModel, dict]:
    """The model on the CPU, and its metadata."""
    content = load_form(find_model(path), PROPERTIES, LAYOUT)
    try:
        if content["convention"] != CONVENTION:
            raise ValueError(f"its convention is {content['convention']!r}; expected {CONVENTION!r}")
        return _built(content), checked_metadata(content["metadata"])
    except (*WRONG, ConfigError, StopIteration) as error:
        raise ModelFileError(
            f"{path} is no usable model of properties: {' '.join(str(error).split())[:200]}"
        ) from error


def _built(content: dict) -> PropertyModel:
    config, weights = stored_config(content["config"]), content["weights"]
    check_weights(weights, config, next(iter(content["weights"].values())).dtype)
    if not bool((weights["segnn.norms"] > 0).all()):
        raise ValueError("its norms are not all above zero")
    species = parse_species(content["species"])
    targets = [_checked_target(values) for values in content["targets"]]
    constants = [Constants(**values) for values in content["constants"]]
    for target, (references, scales, size) in zip(targets, constants, strict=True):
        numbers = [size, *scales, *(value for row in references for value in row)]
        shapes = (len(references), {len(row) for row in references}, len(scales))
        if (
            shapes != (len(species), {len(target.scalars)}, target.dim)
            or not all(map(math.isfinite, numbers))
            or size <= 0
        ):
            raise ValueError(f"the constants of {target.name!r} are not as many finite numbers as it needs")
    model = PropertyModel(config, species, targets, constants=constants)
    load_weights(model.to(next(iter(weights.values())).dtype), weights, config)
    return model.eval()


def _checked_target(values: dict) -> Target:
    target = Target(**{**values, "shape": tuple(values["shape"])})
    check_name(target.name)
    if target.shape not in ((), (3,), (3, 3)) and not (len(target.shape) == 1 and target.shape[0] > 0):
        raise ValueError(f"the shape of {target.name!r} is {target.shape}")
    if target.shape == (3, 3) and not is_of_matrix(target.irreps):
        raise ValueError(f"the irreps of {target.name!r} are {target.irreps!r}, which are not of a matrix")
    if target.pooling not in POOLINGS[target.per] or (target.pooling == "zero" and target.shape):
        raise ValueError(f"the pooling of {target.name!r} is {target.pooling!r}")
    return target._replace(irreps=checked_irreps(target.name, target.shape, target.irreps))
