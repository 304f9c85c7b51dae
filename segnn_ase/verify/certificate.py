"""`Certificate`: what `verify` found, as text, JSON, a figure, and in the model file."""

import math
from json import dumps
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segnn_ase.base.figures import plot_certificate
from segnn_ase.base.files import write_atomically
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.store.shipped import find_model


class Check(NamedTuple):
    """One line: what was measured, and whether it is within the tolerance; `passed` is None where there is none."""

    name: str
    value: float | None
    tolerance: float | None
    unit: str
    passed: bool | None
    note: str = ""


class Certificate(NamedTuple):
    checks: tuple[Check, ...]
    context: dict  # model, structure, device, precision, code, versions
    time_fs: np.ndarray  # of the trajectory at constant energy
    energy_per_atom: np.ndarray  # eV, its total energy

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if check.passed is False]


def table(certificate: Certificate) -> str:
    """The certificate as text, a line for each check."""
    context = dict(certificate.context)
    versions = ", ".join(f"{name} {version}" for name, version in context.pop("versions").items())
    context.pop("ms_per_step")
    lines = [f"{name:10} {value}" for name, value in {**context, "versions": versions}.items()]
    width = max(len(check.name) for check in certificate.checks)
    lines += ["", f"{'check':{width}} {'measured':>9} {'tolerance':>9} {'unit':10} result"]
    for check in certificate.checks:
        value, limit = (f"{x:9.2g}" if x is not None else f"{'':9}" for x in (check.value, check.tolerance))
        note = f"  {check.note}" if check.note else ""
        lines.append(f"{check.name:{width}} {value} {limit} {check.unit:10} {result(check):6}{note}".rstrip())
    judged = [check for check in certificate.checks if check.passed is not None]
    held = sum(check.passed for check in judged)
    return "\n".join([*lines, "", f"{held} of {len(judged)} checks hold"])


def result(check: Check) -> str:
    if check.passed is None:
        return "n.a." if check.value is None else ""
    return "pass" if check.passed else "FAIL"


def as_plain(certificate: Certificate) -> dict:
    """The certificate in plain values, for JSON and model files."""
    checks = [check._asdict() for check in certificate.checks]
    return {**certificate.context, "passed": certificate.passed, "checks": checks}


def write(
    certificate: Certificate, *, json: Path | None = None, png: Path | None = None, model: "str | Path | None" = None
) -> list[Path]:
    """Write the files that are asked for: lines as JSON, a figure, the summary in the model file; returns them."""
    written = []
    if json is not None:
        text = dumps(_finite(as_plain(certificate)), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(json, text.encode())
        written.append(json)
    if png is not None:
        plot_certificate(png, _ratios(certificate), certificate.time_fs, certificate.energy_per_atom)
        written.append(png)
    return written if model is None else [*written, store(certificate, model)]


def _ratios(certificate: Certificate) -> dict[str, float]:
    """Measured / tolerance of all that is judged; what could not be measured is infinitely wrong."""
    ratios = {}
    for check in certificate.checks:
        if check.passed is not None:
            wrong = math.inf if not check.passed else 0.0
            ratios[check.name] = check.value / check.tolerance if check.value is not None and check.tolerance else wrong
    return ratios


def _finite(value):
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def store(certificate: Certificate, model: "str | Path") -> Path:
    """Write the summary into the model file, in the place of an older one of the same structure, dtype and device."""
    path = find_model(model)
    potential, metadata = load_with_metadata(path)
    context = certificate.context
    key = ", ".join(context[name] for name in ("structure", "dtype", "device"))
    verified = {**metadata.get("verified", {}), key: as_plain(certificate)}
    save_potential(path, potential, metadata={**metadata, "verified": verified})
    return path
