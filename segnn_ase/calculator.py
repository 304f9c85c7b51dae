"""`SEGNNCalculator`: a potential, or a committee of them, as an ASE calculator."""

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress

from segnn_ase.base.devices import resolve_device, resolve_dtype
from segnn_ase.base.errors import (
    ConfigError,
    DomainError,
    DomainWarning,
    StructureError,
    UnusedInputWarning,
    expect,
    level_of_caller,
)
from segnn_ase.base.threads import one_at_a_time
from segnn_ase.compiled.choose import MODES, choose_evaluator
from segnn_ase.inspection import InspectedCalculator, as_numpy, dispersion_to_add, like, with_dispersion
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, by_structure, with_born
from segnn_ase.model.structures import graph_of
from segnn_ase.store.model_file import COUNTED, Committee, load_committee, settings_of
from segnn_ase.store.tensors import checksum
from segnn_ase.structure.cue_settings import FIELD, Cue, names_read
from segnn_ase.structure.cues import names_of_responses, responses_of
from segnn_ase.structure.graph import Graph, collate, within
from segnn_ase.structure.ions import with_net_charge
from segnn_ase.structure.neighbors import resolve_backend
from segnn_ase.structure.skin import SkinGraphs
from segnn_ase.structure.told import said_in, same_told
from segnn_ase.trust.monitor import Monitor
from segnn_ase.trust.unused import unused_input

BATCH_ATOMS = 2048  # in one pass of `evaluate`
DERIVATIVES = ("forces", "stress", "stresses")
OF_ATOMS = ("dipole", "polarizability")  # that are read out of atoms
BORN = "born_effective_charges"
VOIGT = np.array([0, 4, 8, 5, 2, 1])  # of a stress (3, 3), which is symmetric to the bit
OUTSIDE = ("warn", "raise", "ignore")


class SEGNNCalculator(InspectedCalculator):
    """Energies, forces and stress of a SEGNN potential.

    model: the path of a model file, the name of a shipped potential, a `Potential`, or a list of these: a
    committee, whose mean is returned; `segnn train --committee` writes one to a single file. `results` also has the
    standard deviations "energy_std" (eV), "forces_std" (N, 3) (eV/Å) and, of a committee for 3D-periodic structures,
    "stress_std" (6,) (eV/Å^3): of the members, or, for one potential that has been calibrated, the estimate of
    `uncertainty.py`.
    domain: what to do with a structure outside the training data (`domain.py`; of a committee that of the first
    member): "warn" once for every kind of reason, "raise" DomainError, or "ignore" them. The reasons are in `results`
    as "outside_domain", a list of `domain.Outside`, empty inside and absent where the model file has no domain.
    device: "auto" takes a GPU if there is one. dtype: "float32", "float64", or None for that of the training.
    skin: Å, the list of neighbours is kept until an atom has moved half as far; "auto" follows the speed of the atoms;
    the results do not depend on it. neighbor_backend: "matscipy" or "torch_cluster"; "auto" takes torch-cluster on a
    GPU, where the pairs are then made and stay, if it is installed. accelerate: "auto" uses compiled code (C on the
    CPU; Triton on a GPU, where the steps are replayed as a CUDA graph) once it has reproduced plain PyTorch on the
    first structure, and warns where it cannot be used, for the life of this calculator; "require" raises
    AccelerationError instead; "off" never uses it. tables: compiled code takes the radial functions from splines,
    whose errors are below 1e-8 (1e-6 in float32); forces stay the exact gradient.
    allow_nonsmooth admits models whose energy jumps when an atom crosses the cutoff (the published SEGNN).
    dispersion: D3, as "d3bj:pbe", for a potential whose labels had none: it is added to energy, forces, stress and
    Hessian. None adds what was taken off the labels in training (`dispersion` under [data]), if there was any; another
    one is refused. The domain, uncertainties and descriptors are of the network's part alone; "stresses", virials and
    heat flux are refused, as the share of each atom in the dispersion's virial is not known.

    Forces are -dE/dr of the energy; stress is (1/V) dE/d(strain) in ASE's sign and Voigt order, defined for
    structures periodic in three directions, else PropertyNotImplementedError; "stresses" are the virials of the atoms
    (N, 6) in eV, defined for every structure, whose sum is the stress times the volume. Only the energy is evaluated
    where only that is asked, unless the forces of the structure before were asked for too: then all at once.
    Raises ConfigError, DeviceError, FileNotFoundError, ModelFileError at construction and StructureError for
    structures that cannot be evaluated.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "stresses"]  # noqa: RUF012 - ASE's interface

    def __init__(
        self,
        model: "str | Path | Potential | list",
        *,
        device: str = "auto",
        dtype: "str | torch.dtype | None" = None,
        skin: "float | Literal['auto']" = "auto",
        neighbor_backend: str = "auto",
        accelerate: Literal["auto", "off", "require"] = "auto",
        tables: bool = True,
        domain: Literal["warn", "raise", "ignore"] = "warn",
        allow_nonsmooth: bool = False,
        dispersion: str | None = None,
        **unknown,
    ):
        if unknown:
            raise ConfigError(_unknown_keyword(next(iter(unknown))))
        super().__init__()
        self.device = resolve_device(device)
        committee = members_of(model)
        self._factors, self._dispersion = committee.factors, dispersion_to_add(committee.potentials, dispersion)
        weights = {"weights": [_checksum(potential) for potential in committee.potentials]}
        self._potentials = [
            _prepare(potential, self.device, resolve_dtype(dtype), allow_nonsmooth)
            for potential in committee.potentials
        ]
        self.parameters = {**weights, "dtype": str(self._potentials[0].dtype).removeprefix("torch.")}
        self.parameters |= {} if self._dispersion is None else {"dispersion": self._dispersion}
        _check_choices(accelerate=(accelerate, MODES), domain=(domain, OUTSIDE))
        for name, value in (("tables", tables), ("allow_nonsmooth", allow_nonsmooth)):
            expect(isinstance(value, bool), name, value, "True or False")
        self._tables = tables
        self._domain, self._warned, self._accelerate = domain, set(), accelerate
        self._evaluators: list[Evaluator] | None = None  # chosen on the first structure with neighbours
        self._meanwhile: list[Evaluator] | None = None  # what is used until then
        self._stamps: list[tuple] | None = None  # of the weights that they know, once somebody has the potentials
        self._monitor = Monitor(self._potentials[0])
        self._box = b"", 0.0  # the last cell that was periodic in three directions, and its volume in Å^3
        elements = {tuple(p.symbols) for p in self._potentials}
        if len(elements) > 1:
            raise ConfigError(
                f"the members of the committee know different elements: {sorted(elements)}; expected the same, for "
                "their mean makes sense only for potentials of one system and level of theory"
            )
        self.cues = self._potentials[0].config.cues
        responses, charged = names_of_responses(self.cues), ["charges"] if self._potentials[0].charges else []
        self.implemented_properties = [*type(self).implemented_properties, *responses, *charged]
        self._derivatives = (*DERIVATIVES, *(name for name in responses if name not in OF_ATOMS))
        if len({(p.config.cues, p.config.electrostatics) for p in self._potentials}) > 1:
            raise ConfigError("the members of the committee differ in cues or electrostatics; expected the same of all")
        backend = resolve_backend(neighbor_backend, self.device.type)
        self._forces_follow = self._asked = False  # whether forces are asked for after the energy, as a rule
        self._cutoffs = [p.cutoff for p in self._potentials]
        self._graphs = {cutoff: SkinGraphs(cutoff, skin, backend, self.device) for cutoff in set(self._cutoffs)}
        self.neighbor_backend = backend

    @property
    def potentials(self) -> list[Potential]:
        """The members of the committee. Who has them may change them: from now on the evaluators are made anew when
        a weight is another, which takes some time at every step to find out."""
        if self._stamps is None:
            self._stamps = [p.stamp() for p in self._potentials]
        return self._potentials

    @property
    def evaluators(self) -> tuple[str, ...]:
        """What evaluates each member, in words; empty before the first structure that has neighbours."""
        return tuple(evaluator.name for evaluator in self._evaluators or ())

    @property
    def told_names(self) -> tuple[str, ...]:
        """What it is told of a structure besides atoms and cell: names in `atoms.arrays` or `atoms.info`."""
        return names_read(self.cues)

    def set(self, **settings):
        if settings:
            raise ConfigError(f"set has {next(iter(settings))!r}; settings are given when a calculator is constructed")
        return super().set()

    def check_state(self, atoms, tol=1e-15):
        found = super().check_state(atoms, tol)
        names = [cue.name for cue in self.cues]
        names += ["charge"] if {"spin", FIELD} & {*names} and "charge" not in names else []  # it may be refused
        if names and self.atoms is not None and not same_told(said_in(self.atoms, names), said_in(atoms, names), tol):
            found += [name for name in names if name not in found]
        return found

    def get_property(self, name, atoms=None, allow_calculation=True):
        self._asked |= allow_calculation and name in self._derivatives
        return super().get_property(name, atoms, allow_calculation)

    @one_at_a_time
    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes) -> None:
        self.atoms = atoms = self.atoms if atoms is None else _copied(atoms, self.before, system_changes)
        if atoms is not None and self.cues:  # a field may be changed in place
            atoms.info |= {name: copy.deepcopy(atoms.info[name]) for name in self.told_names if name in atoms.info}
        periodic = atoms is None or all(atoms.pbc.tolist())  # that there is nothing is said below
        if "stress" in properties and not periodic:
            raise PropertyNotImplementedError(
                f"stress needs a structure that is periodic in three directions; pbc is {atoms.pbc.tolist()}"
            )
        graphs = {cutoff: self._graph(atoms, cutoff) for cutoff in self._graphs}
        if system_changes:  # a new structure: were forces of the one before asked for?
            self._forces_follow, self._asked = self._asked, any(map(properties.__contains__, self._derivatives))
        derivatives = self._forces_follow or any(map(properties.__contains__, self._derivatives))
        wanted = {"forces": derivatives, "stress": derivatives and periodic}
        members = self._said(graphs, properties, wanted)
        results = self._watched(atoms, graphs, members, properties)
        _report(results, self._domain, self._warned)  # what is refused here must not be found in the cache
        self.results = results

    def export_properties(self) -> Properties:
        """ASE's own properties; the deviations and what is outside are in `results` only."""
        names = [name for name in self.implemented_properties if name in all_outputs and name in self.results]
        return Properties({name: self.results[name] for name in names})

    @one_at_a_time
    def evaluate(self, structures: Iterable[Atoms], properties: Sequence[str] = ("energy", "forces")) -> list[dict]:
        """Results of many structures, several in one pass: for screening, and faster for small molecules.

        Returns ASE's `results` of each, with what `calculate` gives and the same numbers up to rounding; stress only
        for those periodic in three directions. Raises ConfigError for unknown properties and StructureError with
        the number of a structure that cannot be evaluated.
        """
        structures, properties = _checked_request(structures, properties, self.implemented_properties)
        results = []
        for first, batch in _batches(structures):
            alone = {cutoff: _alone(batch, first, cutoff, skin, self._graph) for cutoff, skin in self._graphs.items()}
            graphs = {cutoff: collate(parts) for cutoff, parts in alone.items()}
            derivatives = any(map(properties.__contains__, self._derivatives))
            members = self._said(graphs, properties, {"forces": derivatives, "stress": derivatives})
            apart = list(zip(*(by_structure(m, batch) for m in members), strict=True))
            for n, (atoms, one) in enumerate(zip(batch, apart, strict=True), first):
                own = {cutoff: parts[n - first] for cutoff, parts in alone.items()}
                results.append(self._watched(atoms, own, one, properties))
                _report(results[-1], self._domain, self._warned, f"structure {n}: ")
        return results

    def _said(self, graphs: dict[float, Graph], properties: Sequence[str], wanted: dict[str, bool]) -> list[Prediction]:
        """What each member says."""
        born = BORN in properties and BORN in self.implemented_properties
        return [
            with_born(evaluator, graphs[cutoff], **wanted) if born else evaluator(graphs[cutoff], **wanted)
            for evaluator, cutoff in zip(self._chosen(graphs), self._cutoffs, strict=True)
        ]

    def _watched(
        self, atoms: Atoms, graphs: dict[float, Graph], members: Sequence[Prediction], properties: Sequence[str]
    ) -> dict:
        """Results of one structure; deviations are those of the committee, where there is one."""
        results = _results(members, self._factors)
        if self.cues and members[0].cue_gradients is not None:
            results |= _responses(atoms, members, self.cues)
        if "stresses" in properties:
            results["stresses"] = full_3x3_to_voigt_6_stress(self._virials(graphs, atoms))
        graph = graphs[self._cutoffs[0]]
        results = with_net_charge(results, atoms, self.cues, graph.field)
        if self._dispersion is not None:
            results = with_dispersion(results, self._dispersion, atoms, properties)
        volume = self._volume(atoms) if all(atoms.pbc.tolist()) else None
        evaluator = self._evaluators[0] if self._evaluators else None
        return {**self._monitor(graph, members[0], volume, evaluator), **results}

    def _volume(self, atoms: Atoms) -> float:
        cell = atoms.cell.array.tobytes()
        if cell != self._box[0]:
            self._box = cell, float(atoms.cell.volume)
        return self._box[1]

    def _chosen(self, graphs: dict[float, Graph]) -> list[Evaluator]:
        """The fastest evaluators that agree with plain PyTorch on the first structure that has neighbours."""
        if self._stamps is not None:
            stamps = [p.stamp() for p in self._potentials]
            if stamps != self._stamps:
                self._stamps, self._evaluators, self._meanwhile = stamps, None, None
                self._monitor = Monitor(self._potentials[0])
        if self._evaluators is not None:
            return self._evaluators
        if all(len(within(graph, cutoff).edge_src) for cutoff, graph in graphs.items()):
            self._evaluators = _choose(self._potentials, graphs, self._accelerate, self._tables)
        else:  # there is nothing to compare yet
            self._meanwhile = self._meanwhile or _choose(self._potentials, graphs, "off", self._tables)
        return self._evaluators or self._meanwhile

    def __getstate__(self) -> dict:
        # compiled code stays in its process: another machine may have another compiler, or none
        return {**super().__getstate__(), "_evaluators": None, "_meanwhile": None}

    def _graph(self, atoms: Atoms | None, cutoff: float, graphs: SkinGraphs | None = None) -> Graph:
        atoms, graphs = self.atoms if atoms is None else atoms, graphs or self._graphs[cutoff]
        graph = graph_of(atoms, graphs, self._potentials[0])  # the other potentials know the same elements
        _report_unused(atoms, self._warned, {*self.told_names})
        return graph


def _copied(atoms: Atoms, before: Atoms | None, changed: Sequence[str]) -> Atoms:
    """`atoms.copy()`, which takes a part of a small molecule's step; where only positions are others, what is set up
    beside arrays and cell serves again."""
    if list(changed) != ["positions"] or type(before) is not type(atoms):
        return atoms.copy()
    copied = object.__new__(type(atoms))
    vars(copied).update(vars(before))
    copied._cellobj, copied._pbc = atoms.cell.copy(), atoms.pbc.copy()
    copied.arrays = {name: array.copy() for name, array in atoms.arrays.items()}
    copied.info, copied.constraints = dict(atoms.info), [copy.deepcopy(constraint) for constraint in atoms.constraints]
    copied.set_celldisp(atoms.get_celldisp())
    return copied


def _report(results: dict, domain: str, warned: set[str], where: str = "") -> None:
    for outside in results.get("outside_domain", ()):
        text = f"{where}outside the training data: {outside.reason}. What would help: frames {outside.help}"
        if domain == "raise":
            raise DomainError(text)
        if domain == "warn" and outside.kind not in warned:
            warned.add(outside.kind)
            warnings.warn(f"{text}. Said once of its kind.", DomainWarning, stacklevel=level_of_caller())


def _report_unused(atoms: Atoms, warned: set[str], used: set[str]) -> None:
    if "unused" not in warned and (unused := unused_input(atoms, used)):
        warned.add("unused")
        text = (
            f"the structure has {', '.join(unused)}: this potential knows nothing of that, and no number depends on it"
        )
        warnings.warn(f"{text}. Said once.", UnusedInputWarning, stacklevel=level_of_caller())


def members_of(model) -> Committee:
    """The potentials that a model means."""
    if isinstance(model, Potential):
        return Committee([copy.deepcopy(model)], {}, {})
    if not isinstance(model, list | tuple):
        return load_committee(model)
    if not model:
        raise ConfigError("model is an empty list; expected at least one potential")
    expect(not any(isinstance(one, list | tuple) for one in model), "model", model, "a list of paths or potentials")
    if len(model) == 1:
        return members_of(model[0])  # the factors of a committee's file stay
    return Committee([potential for one in model for potential in members_of(one).potentials], {}, {})


def _checksum(potential: Potential) -> str:
    """What the energies depend on, in the precision of the training, as 16 digits."""
    constants = [settings_of(potential.config, always=COUNTED), potential.species, potential.reference_energies]
    return checksum([*constants, potential.scales, dict(potential.state_dict())])[:16]


def _prepare(potential: Potential, device: torch.device, dtype: torch.dtype | None, allow_nonsmooth: bool) -> Potential:
    if not potential.config.smooth and not allow_nonsmooth:
        raise ConfigError(
            "this model is not smooth (smooth = false): its energy jumps when an atom crosses the cutoff, and MD "
            "with it does not conserve energy; pass allow_nonsmooth=True to use it all the same"
        )
    return potential.to(device=device, dtype=dtype or potential.dtype).eval().requires_grad_(False)


def _choose(potentials: list[Potential], graphs: dict[float, Graph], mode: str, tables: bool) -> list[Evaluator]:
    return [choose_evaluator(p, graphs[p.cutoff], mode, tables=tables) for p in potentials]


def _check_choices(**choices: tuple) -> None:
    for name, (value, known) in choices.items():
        expect(isinstance(value, str) and value in known, name, value, f"one of {', '.join(known)}")


def _checked_request(structures, properties, names: Sequence[str]) -> tuple[Iterable[Atoms], Sequence[str]]:
    """Arguments of `evaluate`. Raises ConfigError."""
    properties = [properties] if isinstance(properties, str) else properties
    known = f"of {', '.join(names)}"
    expect(isinstance(properties, Iterable), "properties", properties, known)
    structures = [structures] if isinstance(structures, Atoms) else structures
    many = isinstance(structures, Iterable) and not isinstance(structures, str)
    expect(many, "structures", structures, "Atoms, or several of them")
    if unknown := [name for name in properties if name not in names]:
        raise ConfigError(f"properties has {unknown[0]!r}; expected {known}")
    return structures, properties


def _alone(structures: list[Atoms], first: int, cutoff: float, like: SkinGraphs, graph_of: Callable) -> list[Graph]:
    """Graphs of structures that are numbered from `first`; graph_of: (atoms, cutoff, graphs) -> graph."""
    graphs = []
    for n, atoms in enumerate(structures, first):
        try:
            graphs.append(graph_of(atoms, cutoff, SkinGraphs(cutoff, 0.0, like.backend, like.device)))
        except StructureError as error:
            raise StructureError(f"structure {n}: {error}") from error
    return graphs


def _batches(structures: Iterable[Atoms]) -> Iterator[tuple[int, list[Atoms]]]:
    """Groups of structures with up to `BATCH_ATOMS` atoms, and the number of the first of each."""
    batch: list[Atoms] = []
    first = 0
    for n, atoms in enumerate(structures):
        expect(isinstance(atoms, Atoms), f"structure {n}", atoms, "Atoms")
        if batch and sum(map(len, batch)) + len(atoms) > BATCH_ATOMS:
            yield first, batch
            batch, first = [], n
        batch.append(atoms)
    if batch:
        yield first, batch


def _results(members: Sequence[Prediction], factors: dict[str, float]) -> dict:
    """Mean over the committee in ASE's names; where there is more than one, standard deviations too, times factors."""
    found = [_results_of(m) for m in members]
    if len(found) == 1:
        return found[0]
    for one in found[1:] if "charges" in found[0] else ():
        one["charges"] = like(one["charges"], found[0]["charges"])
    stacks = {name: np.array([one[name] for one in found]) for name in found[0]}
    results = {name: stack.mean(axis=0) for name, stack in stacks.items()}
    for name in ("energy", "forces", "stress"):
        if name in stacks:
            results[f"{name}_std"] = factors.get(name, 1.0) * stacks[name].std(axis=0, ddof=1)
    return results


def _responses(atoms: Atoms, members: Sequence[Prediction], cues: Sequence[Cue]) -> dict:
    """Mean over the committee of the conjugates of what it is told."""
    found = [responses_of(atoms, as_numpy(p.cue_gradients), cues) for p in members]
    return {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}


def _results_of(p: Prediction) -> dict:
    energies, energy = as_numpy(p.energies), p.energy.item()
    if not math.isfinite(energy) and not np.isfinite(energies).all():
        atom = int(np.flatnonzero(~np.isfinite(energies))[0])
        raise StructureError(
            f"the energy of atom {atom} is {energies[atom]} eV: the structure is far from all that the potential was "
            "trained on, or its weights are broken"
        )
    results = {"energy": energy, "free_energy": energy, "energies": energies}
    if p.forces is not None:
        results["forces"] = as_numpy(p.forces)
    if p.stress is not None:
        results["stress"] = as_numpy(p.stress).reshape(9)[VOIGT]
    if p.dipole is not None and p.polarizability is not None:
        results |= {"dipole": as_numpy(p.dipole)[0], "polarizability": as_numpy(p.polarizability)[0]}
    results |= {name: as_numpy(x) for name, x in ((BORN, p.born), ("charges", p.charges)) if x is not None}
    return results


def _unknown_keyword(name: str) -> str:
    known = ["device", "dtype", "skin", "neighbor_backend", "accelerate", "tables", "domain"]
    known += ["allow_nonsmooth", "dispersion"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"unknown keyword {name!r} of SEGNNCalculator: {hint}"
