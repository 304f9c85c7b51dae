"""`verify`: what must hold for a potential, measured on the user's own model, structure, device and precision.

Everything goes through `SEGNNCalculator`, as it does in a simulation.
"""

import platform
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import ase
import numpy as np
import torch
from ase import Atoms

from segnn_ase import __version__
from segnn_ase.base.errors import SEGNNError, expect
from segnn_ase.base.files import progress_bar
from segnn_ase.calculator import SEGNNCalculator, members_of
from segnn_ase.inspection import dispersion_to_add
from segnn_ase.model.elements import check_elements
from segnn_ase.model.potential import Potential
from segnn_ase.structure.cue_settings import names_read
from segnn_ase.structure.told import bare as alone
from segnn_ase.verify.certificate import Certificate, Check
from segnn_ase.verify.checks import BLOCKS, CHECKS
from segnn_ase.verify.of_cues import with_defaults
from segnn_ase.verify.states import Subject, code_of, parts_of, sizes_of, state_of, without
from segnn_ase.verify.trajectory import constant_energy_run


def verify(
    model: "str | Path | Potential | list",
    atoms: Atoms,
    *,
    device: str = "auto",
    dtype: "str | torch.dtype | None" = None,
    accelerate: str = "auto",
    neighbor_backend: str = "auto",
    dispersion: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Certificate:
    """Check on a structure of the user's own that a potential is what it should be; see `CHECKS`.

    model, device, dtype, accelerate, neighbor_backend, dispersion: as for `SEGNNCalculator`. Where dispersion is added
    the trajectory has it, a check is about the sum, and the others are about the network. steps: of the trajectory at
    constant energy; by default fewer for larger structures. Raises what the calculator raises for models and
    structures that cannot be evaluated; what goes wrong later is a line that fails.
    """
    many = steps is None or (isinstance(steps, int | np.integer) and steps >= 2 * BLOCKS)
    expect(many, "steps", steps, f"at least {2 * BLOCKS}")
    expect(isinstance(seed, int | np.integer) and 0 <= seed < 2**63, "seed", seed, "an integer from 0 to 2^63 - 1")
    expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    models = members_of(model).potentials
    dispersion = dispersion_to_add(models, dispersion)
    for potential in models:
        potential.dispersion = None
    check_elements(models[0].symbols, models[0].species, atoms.numbers)
    options = {"device": device, "dtype": dtype, "accelerate": accelerate, "neighbor_backend": neighbor_backend}
    make = partial(SEGNNCalculator, models, domain="ignore", allow_nonsmooth=True, **options)
    bare = alone(atoms, names_read(models[0].config.cues))
    bare.set_masses(atoms.get_masses())
    bare = with_defaults(bare, models[0].config.cues)
    calc = make()
    here = state_of(calc, bare)
    outside = calc.results.get("outside_domain")
    parts = parts_of(calc, models, bare, options)
    double = calc if parts.potentials[0].dtype is torch.float64 else make(dtype="float64")
    sizes = sizes_of(parts, bare, calc.get_pairs(bare), here)
    steps = int(np.clip(60_000 // len(bare), 60, 400)) if steps is None else steps
    with progress_bar(shown=progress, total=len(CHECKS) + 1, unit="check") as bar:
        in_use = calc if dispersion is None else make(dispersion=dispersion)
        run = constant_energy_run(in_use, bare, steps, seed)
        bar.update()
        subject = Subject(bare, make, calc, double, parts, here, sizes, run, outside, seed, dispersion)
        checks: list[Check] = []
        for check in CHECKS:
            try:
                checks += check(subject)
            except SEGNNError as error:
                name, told = check.__name__.replace("_", " "), str(error)
                if "multiplicity" in told:  # parts of it, or other elements, have another number of electrons
                    checks.append(without(name, told))
                else:
                    checks.append(Check(name, None, None, "", False, told))
            bar.update()
    times = run.timestep * np.arange(len(run.energy))
    return Certificate(tuple(checks), _context(model, subject), times, run.energy / len(bare))


def _context(model, s: Subject) -> dict:
    given = model if isinstance(model, list | tuple) else [model]
    named = [str(m) if isinstance(m, str | Path) else "a Potential" for m in given]
    return {
        "model": ", ".join(named),
        "structure": f"{s.atoms.get_chemical_formula()}, pbc {''.join('FT'[int(p)] for p in s.atoms.pbc)}",
        "device": str(s.calc.device),
        "dtype": str(s.dtype).removeprefix("torch."),
        "code": code_of(s.calc),
        "neighbors": s.calc.neighbor_backend,
        **({} if s.dispersion is None else {"dispersion": f"{s.dispersion}, in its own lines and the trajectory"}),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "segnn_ase": __version__,
            **{module.__name__: str(module.__version__) for module in (torch, ase, np)},
            "python": platform.python_version(),
        },
        "ms_per_step": s.run.ms_per_step,
    }
