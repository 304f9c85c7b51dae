"""A page about a model, for `segnn info`: what it is, what it knows, how far off it may be."""

import math

from ase.data import chemical_symbols

from segnn_ase.model.potential import Potential
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.trust.domain import describe_domain


def describe_model(potentials: list[Potential], factors: dict[str, float], metadata: dict) -> str:
    """Elements, settings, reference energies and size of a committee's members, and what was measured."""
    one = potentials[0]
    lines = [] if len(potentials) == 1 else [_of_committee(len(potentials), factors)]
    lines += _of_network(one)
    if one.dispersion is not None:
        lines.append(f"dispersion  {one.dispersion}, taken off the labels; the calculator adds it")
    if one.domain is not None:
        lines.append(f"domain      {describe_domain(one.domain, one.symbols)}")
    if one.examples is not None:
        atoms, n = len(one.examples.numbers), len(one.examples.sizes)
        lines.append(f"stored      {n} structures with {atoms} atoms, for fine-tuning that keeps what it knows")
    if len(potentials) == 1:
        lines += _of_uncertainty(one)
    lines += [_of_errors(name, errors) for name, errors in metadata.get("errors", {}).items()]
    lines += [_of_certificate(on, found) for on, found in metadata.get("verified", {}).items()]
    if origin := metadata.get("learned_from"):
        lines.append(
            f"labels      {origin['labels']} by {origin['about']}; licence of the reference: {origin['licence']}"
        )
    return "\n".join(lines)


def _of_committee(members: int, factors: dict[str, float]) -> str:
    listed = ", ".join(f"{name} {factor:.3g}" for name, factor in factors.items())
    return f"committee   {members} potentials like this one; spread times {listed}"


def _of_network(potential: Potential) -> list[str]:
    config = potential.config
    references = ", ".join(
        f"{chemical_symbols[z]} {e:.4f}" for z, e in zip(potential.species, potential.reference_energies, strict=True)
    )
    further = config.lmax_attr > 0 or config.density_weighting  # attributes and densities of the neighbours
    beyond = ", and charges beyond" if potential.charges else ""
    hops = config.interactions + further
    return [
        f"elements    {' '.join(potential.symbols)}",
        f"E0          {references} eV",
        f"irreps      {config.hidden_irreps}, attributes to l = {config.lmax_attr}, {config.interactions} interactions",
        *(f"told        {_of_cue(cue)}" for cue in config.cues),
        *(
            [f"charges     {config.electrostatics}, of width {config.smearing:g} Å, which act at any distance"]
            if potential.charges
            else []
        ),
        f"cutoff      {config.cutoff} Å; atoms within {config.cutoff * hops:g} Å act on the energy of an atom{beyond}",
        f"parameters  {sum(p.numel() for p in potential.parameters())}, {potential.dtype}".replace("torch.", ""),
    ]


def _of_cue(cue: Cue) -> str:
    coupled = ", coupled to space by spin-orbit interaction" if cue.spin_orbit else ""
    place = "atoms.arrays" if cue.per == "node" else "atoms.info"
    without = "needed" if cue.default == "error" else f"{cue.default} where it is missing"
    scale = f"scale {cue.scale:g}; " if cue.size else ""
    return f"{cue.name} ({place}; {cue.kind}{coupled}; {scale}{without})"


def _of_uncertainty(potential: Potential) -> list[str]:
    u = potential.uncertainty
    if u is None or not math.isfinite(u.beta):
        return []
    return [
        f"uncertainty of a usual force {1e3 * u.beta:.3g} meV/Å, growing with the leverage to the power of "
        f"{u.gamma:.2g}; calibrated on {u.calibrated_on} frames"
    ]


def _of_errors(name: str, errors: dict[str, float | None]) -> str:
    return f"errors      {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in errors.items() if v is not None)


def _of_certificate(on: str, found: dict) -> str:
    judged = [check for check in found["checks"] if check["passed"] is not None]
    failed = [check["name"] for check in judged if not check["passed"]]
    verdict = f"fails {'; '.join(failed)}" if failed else f"all {len(judged)} checks hold"
    return f"verified    {found['date'][:10]} on {on}: {verdict}"
