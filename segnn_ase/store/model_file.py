"""The model file: potentials and committees as plain content, versioned, and read without trust.

The form is safetensors (see `tensors`), decided before version 0.1.0 against what was there, the zip archive with a
pickle of `torch.save`, read by `torch.load(weights_only=True)` after checks of our own:

- Safety. A pickle is a program, and its safe reader had holes: CVE-2025-32434 (code runs; torch below 2.6) and
  CVE-2026-24747 (memory is overwritten; torch below 2.10), while this package takes torch from 2.4 on. PyTorch calls
  it secure no longer, and gives safetensors "the most safety": lengths, JSON, numbers, nothing that could be run.
- Code of our own. 178 lines instead of 138, since safetensors knows no nested values: `nested` turns them into JSON.
  Those of the archive (names in pickles, members that come twice, sizes that lie) had to be complete to be safe.
- Others. Any language reads the file with a JSON parser (a test does so in ten lines); a pickle needs PyTorch.
- Time and size, for the shipped potentials: loaded in 5 to 6 ms instead of 12 to 13, written in 9 instead of 6, as
  large within 0.3 %; a resume file of 4 MB: 2 % larger, loaded in half the time, written in 1.5 times.

Files are still called `model.pt`, as the settings of a training ask; the form is found by content, so that any name
can be read. Version 1 is the first that was released.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

from segnn_ase.base.devices import resolve_device, resolve_dtype
from segnn_ase.base.dispersion_name import parse_dispersion
from segnn_ase.base.errors import ConfigError, ModelFileError, expect, in_short
from segnn_ase.model.elements import parse_species
from segnn_ase.model.irreps import CONVENTION, multiplicities, parse_irreps
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import ModelConfig
from segnn_ase.store.shipped import find_model
from segnn_ase.store.tensors import load_tensors, save_tensors
from segnn_ase.structure.dispersion import require_dispersion
from segnn_ase.structure.stored import parse_stored
from segnn_ase.trust.domain import domain_content, parse_domain
from segnn_ase.trust.uncertainty import parse_uncertainty

FORMAT = "segnn_ase potential"
COMMITTEE = "segnn_ase committee"
OTHERS = {  # that are no potentials, and what takes them
    "segnn_ase properties": ": segnn predict and segnn_ase.properties.PropertyCalculator take it",
    "segnn_ase time-stepper": ": segnn_ase.dynamics.load_stepper takes it",
}
VERSION = 1
UNITS = {"energy": "eV", "length": "Å", "forces": "eV/Å", "stress": "eV/Å^3"}
WRONG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # from content of any kind
SINCE = {
    "density_weighting": False,
    "bound": 0.0,
    "power_scale": 1.0,
    "cues": (),
    "electrostatics": "none",
    "smearing": 1.5,
}  # settings that came later, as the networks before had them
COUNTED = ("density_weighting", "bound", "cues")  # in checksums that restart files have, though they came later


def settings_of(model: ModelConfig, *, always: Collection[str] = ()) -> dict:
    """The settings of a network, without those that came later where they are as it was before, but `always` some."""
    unchanged = {name for name, value in SINCE.items() if name not in always and getattr(model, name) == value}
    return model.model_dump(mode="json", exclude=unchanged)


# functions that turn the content of version n into that of version n + 1; add one with each new version
UPGRADES: dict[int, Callable[[dict], dict]] = {}


def save_potential(path: "str | Path", potential: Potential, *, metadata: dict | None = None) -> None:
    """Write a potential with its provenance; metadata holds plain values (training settings, errors)."""
    expect(isinstance(potential, Potential), "potential", potential, "a Potential")
    expect(isinstance(path, str | os.PathLike), "path", path, "a path")
    expect(metadata is None or isinstance(metadata, dict), "metadata", metadata, "a dict of plain values")
    save_tensors(path, _content(potential, metadata))


class Committee(NamedTuple):
    """Potentials of one system and level of theory, and by how much their spread underestimates their errors."""

    potentials: list[Potential]
    factors: dict[str, float]  # "energy", "forces", "stress"
    metadata: dict


def save_committee(path: "str | Path", committee: Committee) -> None:
    """Write the members of a committee to one file, which `SEGNNCalculator` takes like that of a potential.

    Raises ConfigError for members with other elements or another cutoff than the first.
    """
    expect(isinstance(committee, Committee), "committee", committee, "a Committee")
    members, factors = committee.potentials, committee.factors
    good = isinstance(members, list | tuple) and all(isinstance(p, Potential) for p in members)
    expect(good, "potentials", members, "a list of potentials")
    good = isinstance(factors, dict) and all(isinstance(f, int | float) and f >= 0 for f in factors.values())
    expect(good, "factors", factors, "a dict of numbers")
    kinds = _kinds(committee.potentials)
    expect(len(kinds) == 1, "potentials", kinds, "members with the same elements, cutoff and dispersion")
    content = {
        "format": COMMITTEE,
        "version": VERSION,
        "members": [_content(p, None) for p in committee.potentials],
        "factors": dict(committee.factors),
        "metadata": committee.metadata,
    }
    save_tensors(path, content)


def _kinds(potentials: list[Potential]) -> list[tuple]:
    """What the members of a committee must have in common: elements, cutoff and dispersion, each once."""
    return list(dict.fromkeys((tuple(p.species), p.cutoff, p.dispersion) for p in potentials))


def _content(potential: Potential, metadata: dict | None) -> dict:
    return {
        "format": FORMAT,
        "version": VERSION,
        "convention": CONVENTION,
        "units": UNITS,
        "config": potential.config.model_dump(mode="json"),
        "species": potential.symbols,
        "reference_energies": list(potential.reference_energies),
        "scales": list(potential.scales),
        "weights": potential.state_dict(),
        "dispersion": None if potential.dispersion is None else parse_dispersion(potential.dispersion),
        "domain": potential.domain and domain_content(potential.domain),
        "uncertainty": potential.uncertainty and potential.uncertainty._asdict(),
        "examples": potential.examples and potential.examples._asdict(),
        "metadata": metadata or {},
    }


def load_potential(
    model: "str | Path", *, device: "str | torch.device" = "cpu", dtype: "str | torch.dtype | None" = None
) -> Potential:
    """Load a potential from a file, or a shipped one by name ("water-pbe0"), ready for evaluation.

    dtype None keeps the precision of the training. Where `potential.dispersion` is not None its energies are without
    that: `SEGNNCalculator` adds it. Raises FileNotFoundError, ModelFileError for files that are truncated, damaged,
    foreign or written by a newer version, and MissingExtraError for dispersion that cannot be evaluated here.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    potential, _ = load_with_metadata(model)
    return potential.to(device=device, dtype=dtype or potential.dtype).eval()


def load_with_metadata(model: "str | Path") -> tuple[Potential, dict]:
    """Load a potential on the CPU in its own precision, and the metadata stored with it."""
    committee = load_committee(model)
    if len(committee.potentials) > 1:
        raise ModelFileError(
            f"{model} is a committee of {len(committee.potentials)} potentials; expected one, such as a member's file"
        )
    return committee.potentials[0], committee.metadata


def load_committee(model: "str | Path") -> Committee:
    """Load a committee; the file of one potential is a committee of one. Raises like `load_potential`."""
    committee = read_committee(model)
    for potential in committee.potentials:
        if potential.dispersion is not None:
            require_dispersion(potential.dispersion, potential.species)
    return committee


def read_committee(model: "str | Path") -> Committee:
    """What a file says, also where its dispersion cannot be evaluated here: to be looked at."""
    path = find_model(model)
    content = load_tensors(path)
    if content.get("format") == COMMITTEE:
        return _read_committee(path, content)
    potential, metadata = _read_potential(path, content)
    return Committee([potential], {}, metadata)


def _read_committee(path: Path, content: dict) -> Committee:
    _checked_version(path, content)  # the members are upgraded one by one; the rest has been the same in all versions
    try:
        potentials = [_read_potential(path, member)[0] for member in content["members"]]
        factors = {name: float(value) for name, value in content["factors"].items()}
        committee = Committee(potentials, factors, dict(content["metadata"]))
    except WRONG as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} does not describe a committee: {error}") from error
    if len(_kinds(potentials)) != 1:
        raise ModelFileError(
            f"{path} is a committee without members, or of members with other elements, cutoffs or dispersion"
        )
    return committee


def _read_potential(path: Path, content: dict) -> tuple[Potential, dict]:
    if content.get("format") != FORMAT:
        hint = OTHERS.get(str(content.get("format")), "")
        raise ModelFileError(f"{path} is a {content.get('format')!r}, not a {FORMAT!r}{hint}")
    content = _upgraded(path, content)
    if content.get("convention") != CONVENTION:
        raise ModelFileError(f"{path} has the convention {content.get('convention')!r}; expected {CONVENTION!r}")
    try:
        return _build(content), checked_metadata(content["metadata"])
    except WRONG as error:
        raise ModelFileError(f"{path} does not describe a model: {' '.join(str(error).split())}") from error


def _upgraded(path: Path, content: dict) -> dict:
    """The content of a potential in the form of today's version."""
    version = _checked_version(path, content)
    try:
        for old in range(version, VERSION):
            content = UPGRADES[old](content)
    except WRONG as error:
        raise ModelFileError(f"{path}, of format version {version}, cannot be read: {error}") from error
    return content


def _checked_version(path: Path, content: dict) -> int:
    version = content.get("version")
    if type(version) is not int or version not in (*UPGRADES, VERSION):
        raise ModelFileError(
            f"{path} has format version {version!r}, but this segnn_ase reads up to {VERSION}: upgrade it"
        )
    return version


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Raises ConfigError for messages that were steered otherwise by what they are told than they are now."""
    known, name = model.state_dict(), "segnn.messages.0.radial.last.weight"
    if config.cues and name in weights and name in known and weights[name].shape != known[name].shape:
        told = ", ".join(cue.name for cue in config.cues)
        raise ConfigError(f"it was written before the way changed in which messages are told {told}: train it again")
    model.load_state_dict(weights)


def stored_config(values: dict) -> ModelConfig:
    """The settings of the network of a file, which may be older than some of them. Raises ConfigError."""
    settings = {**SINCE, **values}
    config = ModelConfig.parse(settings, section="model")
    if missing := ModelConfig.model_fields.keys() - settings.keys():
        raise ConfigError(f"config lacks {', '.join(sorted(missing))}")
    return config


def _build(content: dict) -> Potential:
    config, weights = stored_config(content["config"]), content["weights"]
    if content["units"] != UNITS:
        raise ConfigError(f"units are {content['units']}; expected {UNITS}")
    check_weights(weights, config, weights["readout.last.last.weight"].dtype)
    for name in ("reference_energies", "scales"):
        if not isinstance(content[name], list):
            raise ConfigError(f"{name} is {in_short(content[name])}; expected a list")
    potential = Potential(
        config,
        parse_species(content["species"]),
        reference_energies=content["reference_energies"],
        scales=content["scales"],
    )
    load_weights(potential.to(weights["readout.last.last.weight"].dtype), weights, config)
    domain, uncertainty = (_with_tuples(content[name], name) for name in ("domain", "uncertainty"))
    potential.domain = domain and parse_domain(domain, len(potential.species))
    potential.uncertainty = uncertainty and parse_uncertainty(uncertainty, potential.readout.width)
    if content.get("dispersion") is not None:  # older files have no such entries
        potential.dispersion = parse_dispersion(content["dispersion"])
    if content.get("examples") is not None:
        potential.examples = parse_stored(content["examples"], potential.species)
    return potential.eval()


def _with_tuples(values: dict | None, name: str) -> dict | None:
    """Values of a NamedTuple, whose ranges and counts a file knows as lists; None stands for none of it."""
    if values is None:
        return None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{name} is {in_short(values)}; expected null or a dict")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_weights(weights: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype) -> None:
    """Before a network is made of them: are they numbers, and as many as one linear layer of it needs at least?"""
    wrong = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ConfigError(f"weights {', '.join(wrong[:3])} have NaN or infinite values")
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"weights are {dtype}; expected float32 or float64")
    needed = sum(n * n for n in multiplicities(parse_irreps(config.hidden_irreps)))
    if needed > sum(value.numel() for value in weights.values()):
        raise ConfigError(f"there are fewer weights than hidden_irreps {config.hidden_irreps!r} needs")


def checked_metadata(metadata: dict) -> dict:
    """Metadata may hold any plain values, but what is printed must be what it seems."""
    for name in ("errors", "verified", "training"):
        if not isinstance(metadata.get(name, {}), dict):
            raise ConfigError(f"metadata of {name!r} is {in_short(metadata[name])}; expected a dict")
    for on, found in metadata.get("verified", {}).items():
        if not isinstance(found["date"], str) or not all({"name", "passed"} <= set(check) for check in found["checks"]):
            raise ConfigError(f"metadata of what was verified on {on!r} is {in_short(found)}; expected checks")
    for name, errors in metadata.get("errors", {}).items():
        if not all(value is None or isinstance(value, int | float) for value in errors.values()):
            raise ConfigError(f"metadata of the errors on {name!r} is {errors}; expected numbers")
    return metadata
