"""The model file: tensors and plain values only, versioned, checked, written atomically.

Loading never runs code: `torch.load(weights_only=True)` reads tensors, dicts, lists, strings and numbers.
A checksum over the whole content refuses what is bit-flipped or spliced.
"""

import copy
import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from ase.data import chemical_symbols

from segnn_ase import domain
from segnn_ase.config import ConfigError, ModelConfig, ModelFileError, existing_file
from segnn_ase.domain import Domain
from segnn_ase.files import write_atomically
from segnn_ase.o3 import CONVENTION
from segnn_ase.potential import Potential, parse_species
from segnn_ase.uncertainty import Uncertainty

FORMAT = "segnn_ase potential"
COMMITTEE = "segnn_ase committee"
VERSION = 3
UNITS = {"energy": "eV", "length": "Å", "forces": "eV/Å", "stress": "eV/Å^3"}


def _without_core(content: dict) -> dict:
    """Version 1 had no core radii; its `zbl` had another switch, which is gone."""
    config = dict(content["config"])
    if config.pop("zbl", False):
        raise ConfigError("its repulsion (zbl = true) is no longer there: train it again")
    n = len(content["species"])
    weights = {**content["weights"], "core_radii": torch.zeros(n, n)}
    return {**content, "version": 2, "config": {**config, "core_repulsion": False}, "weights": weights}


def _without_domain(content: dict) -> dict:
    """Version 2 had a summary of the training data that nothing was compared with, and no uncertainty."""
    metadata = {name: value for name, value in content["metadata"].items() if name != "domain"}
    return {**content, "version": 3, "domain": None, "uncertainty": None, "metadata": metadata}


# functions that turn a file of version n into one of version n + 1
UPGRADES = {1: _without_core, 2: _without_domain}


def save_tensors(path: "str | Path", content: dict) -> None:
    """Save a dict of tensors and plain values with a checksum, atomically. Raises TypeError for other values."""
    for name, value in content.items():
        _check_plain(value, name)
    buffer = io.BytesIO()
    torch.save({**content, "checksum": checksum(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def _check_plain(value, name: str) -> None:
    """Refuse what `load_tensors` would refuse: a numpy number, say, can be written but not read back safely."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(item, f"{name}[{key!r}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected tensors and plain Python values")


def load_tensors(path: "str | Path", argument: str = "model") -> dict:
    """Load what `save_tensors` wrote. Raises FileNotFoundError or ModelFileError with the reason."""
    path = existing_file(path, argument)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ModelFileError(f"{path} is damaged: checksum error in {damaged}. Copy it again from the source.")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ModelFileError:
        raise
    except Exception as error:  # zip, pickle and tensor readers raise anything on foreign or torn files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(
            f"{path} is not a readable model file (truncated, damaged, or of another program): {reason}"
        ) from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ModelFileError(f"{path} was not written by segnn_ase: it has no checksum")
    stored = content.pop("checksum")
    if stored != checksum(content):
        raise ModelFileError(f"{path} is damaged: its content does not match its checksum. Copy it again.")
    return content


def checksum(content) -> str:
    """SHA-256 over names, values, shapes and bits of nested dicts, lists, tensors and plain values."""
    digest = hashlib.sha256()
    _digest(content, digest)
    return digest.hexdigest()


def _digest(value, digest) -> None:
    if isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for key, item in value.items():
            _digest(key, digest)
            _digest(item, digest)
    elif isinstance(value, list | tuple):
        digest.update(b"[%d" % len(value))
        for item in value:
            _digest(item, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode())


def save_potential(path: "str | Path", potential: Potential, *, metadata: dict | None = None) -> None:
    """Write a potential with its provenance; metadata holds plain values (training settings, errors)."""
    save_tensors(path, _content(potential, metadata))


class Committee(NamedTuple):
    """Potentials of one system and level of theory, and by how much their spread underestimates their errors."""

    potentials: list[Potential]
    factors: dict[str, float]  # "energy", "forces", "stress"
    metadata: dict


def save_committee(path: "str | Path", committee: Committee) -> None:
    """Write the members of a committee to one file, which `SEGNNCalculator` takes like that of a potential."""
    content = {
        "format": COMMITTEE,
        "version": VERSION,
        "members": [_content(p, None) for p in committee.potentials],
        "factors": dict(committee.factors),
        "metadata": copy.deepcopy(committee.metadata),
    }
    save_tensors(path, content)


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
        "weights": {k: v.detach().cpu().clone() for k, v in potential.state_dict().items()},
        "domain": potential.domain and potential.domain._asdict(),
        "uncertainty": potential.uncertainty and potential.uncertainty._asdict(),
        "metadata": copy.deepcopy(metadata or {}),
    }


def load_potential(
    model: "str | Path", *, device: "str | torch.device" = "cpu", dtype: torch.dtype | None = None
) -> Potential:
    """Load a potential from a file, or a shipped one by name ("water-pbe0"), ready for evaluation.

    dtype None keeps the precision of the training. Raises FileNotFoundError, and ModelFileError for files
    that are truncated, damaged, foreign or written by a newer version.
    """
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
    path = find_model(model)
    content = load_tensors(path)
    if content.get("format") == COMMITTEE:
        _check_version(path, content)
        try:
            potentials = [_read(path, member)[0] for member in content["members"]]
            factors = {name: float(value) for name, value in content["factors"].items()}
            committee = Committee(potentials, factors, dict(content["metadata"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{path} does not describe a committee: {error}") from error
        if not potentials:
            raise ModelFileError(f"{path} is a committee without members")
        return committee
    potential, metadata = _read(path, content)
    return Committee([potential], {}, metadata)


def _check_version(path: Path, content: dict) -> None:
    version = content.get("version")
    if version not in (*UPGRADES, VERSION):
        raise ModelFileError(
            f"{path} has format version {version!r}, but this segnn_ase reads up to {VERSION}: upgrade it"
        )


def _read(path: Path, content: dict) -> tuple[Potential, dict]:
    if content.get("format") != FORMAT:
        raise ModelFileError(f"{path} is a {content.get('format')!r}, not a {FORMAT!r}")
    _check_version(path, content)
    version = content["version"]
    try:
        while content["version"] < VERSION:
            content = UPGRADES[content["version"]](content)
    except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}, of format version {version}, cannot be read: {error}") from error
    if content.get("convention") != CONVENTION:
        raise ModelFileError(f"{path} has the convention {content.get('convention')!r}; expected {CONVENTION!r}")
    try:
        return _build(content), content["metadata"]
    except (AttributeError, ConfigError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} does not describe a model: {' '.join(str(error).split())}") from error


def _build(content: dict) -> Potential:
    potential = Potential(
        ModelConfig.parse(content["config"], section="model"),
        parse_species(content["species"]),
        reference_energies=content["reference_energies"],
        scales=content["scales"],
    )
    dtype = content["weights"]["readout.last.last.weight"].dtype
    potential.to(dtype).load_state_dict(content["weights"], strict=True)
    if content["domain"] is not None:
        potential.domain = Domain(**content["domain"])
    if content["uncertainty"] is not None:
        potential.uncertainty = Uncertainty(**content["uncertainty"])
    return potential.eval()


def find_model(model: "str | Path") -> Path:
    """Return the path of a model given by path, or by the name of a shipped potential."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    shipped = shipped_potentials()
    if str(model) in shipped:
        return shipped[str(model)]
    raise FileNotFoundError(
        f"model is {str(model)!r}: there is no such file (working folder {Path.cwd()}), "
        f"and no such shipped potential; shipped are {', '.join(shipped) or 'none'}"
    )


def shipped_potentials() -> dict[str, Path]:
    """Names and files of the potentials that come with the package, installed or in a checkout."""
    package = Path(__file__).parent
    checkout = (package.parent / "pyproject.toml").is_file()
    folder = (package.parent if checkout else package) / "potentials"
    return {path.parent.name: path for path in sorted(folder.glob("*/model.pt"))}


def describe(potential: Potential, metadata: dict, *, members: int = 1) -> str:
    """A page about a model: elements, settings, reference energies, size, measured errors."""
    references = ", ".join(
        f"{chemical_symbols[z]} {e:.4f}" for z, e in zip(potential.species, potential.reference_energies, strict=True)
    )
    config = potential.config
    hops = config.interactions + (config.lmax_attr > 0)  # the node attributes of the neighbours reach one further
    lines = [
        f"elements    {' '.join(potential.symbols)}",
        f"E0          {references} eV",
        f"irreps      {config.hidden_irreps}, attributes to l = {config.lmax_attr}, {config.interactions} interactions",
        f"cutoff      {config.cutoff} Å; atoms within {config.cutoff * hops:g} Å act on the energy of an atom",
        f"parameters  {sum(p.numel() for p in potential.parameters())}, {potential.dtype}".replace("torch.", ""),
    ]
    if members > 1:
        lines.insert(0, f"committee of {members} potentials like this one")
    if potential.domain is not None:
        lines.append(f"domain      {domain.describe(potential.domain, potential.symbols)}")
    if potential.uncertainty is not None:
        u = potential.uncertainty
        lines.append(
            f"uncertainty of a usual force {1e3 * u.beta:.3g} meV/Å, growing with the leverage to the power of "
            f"{u.gamma:.2g}; calibrated on {u.calibrated_on} frames"
        )
    for name, errors in metadata.get("errors", {}).items():
        lines.append(f"errors      {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in errors.items() if v is not None))
    for on, found in metadata.get("verified", {}).items():
        judged = [check for check in found["checks"] if check["passed"] is not None]
        failed = [check["name"] for check in judged if not check["passed"]]
        verdict = f"fails {'; '.join(failed)}" if failed else f"all {len(judged)} checks hold"
        lines.append(f"verified    {found['date'][:10]} on {on}: {verdict}")
    return "\n".join(lines)
