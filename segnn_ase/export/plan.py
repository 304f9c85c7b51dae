"""The network of a potential as tables in C, and the numbers that they speak of: what `compiled/cpu.py` gives to the
runtime in memory, for a library that stands alone."""

from typing import NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols

from segnn_ase.compiled.c_steps import Panels, StepInC, TensorInC, privately, shape_of, steps_in_c
from segnn_ase.compiled.cpu_evaluation import EDGES_PER_THREAD
from segnn_ase.compiled.derivatives import Operation
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import Evaluation, Storage, evaluation
from segnn_ase.compiled.runtime import KINDS
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.compiled.steps import Place, Weight
from segnn_ase.model.coulomb import COULOMB
from segnn_ase.model.potential import Potential
from segnn_ase.model.repulsion import CORE_BLUR, CORE_SWITCH
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.trust.domain import DISTANCE, DomainCheck


class Stage(NamedTuple):
    """Segments up to where processes exchange something, and what: storages of atoms' rows."""

    first: int
    size: int
    direction: str  # "SEGNN_FORWARD" to copies of atoms, "SEGNN_REVERSE" from them, or none
    exchanged: list[Storage]


class Plan:
    """What stands in the library (`tables`, `kernels`), and what in its file (`numbers`)."""

    def __init__(self, potential: Potential):
        tables = radial_tables(potential)
        self._potential, self._knot = potential, tables.step
        self._plan: Evaluation = evaluation(make_steps(potential, tables))
        self._segments, self._places = self._plan.everything, self._plan.storage()
        self._steps = steps_in_c(self._segments, self._places)
        self._storages = list(dict.fromkeys(self._places.values()))
        self._at = {storage: k for k, storage in enumerate(self._storages)}
        self._private = privately(self._segments, self._places)
        self.kernels: dict[tuple[Operation, int | str], str] = {}  # and the names of their functions
        self._raw: dict[Weight, int] = {}  # where weights begin among the numbers: those in panels as they are
        self._panels: dict[Panels, int] = {}
        self._parts: list[np.ndarray] = []
        self._length = 0
        self._look_through()

    def _look_through(self) -> None:
        for step in (step for steps in self._steps for step in steps):
            if step.function is not None:
                self.kernels.setdefault(step.function, f"segnn_rows_{len(self.kernels)}")
            for x in step.tensors:
                if isinstance(x.of, Panels):
                    self._panels.setdefault(x.of, len(self._panels))
                    self._keep(x.of.weight, x.of.weight.parameter.detach())
                elif isinstance(x.of, Weight):
                    self._keep(x.of, x.of.parameter.detach().double() * x.of.scale)

    def _keep(self, weight: Weight, values: torch.Tensor) -> None:
        if weight not in self._raw:
            part = values.to(self._potential.dtype).contiguous().numpy().ravel()
            self._raw[weight], self._length = self._length, self._length + -(-(part.size + 1) // 16) * 16
            self._parts += [part, np.zeros(self._length - self._raw[weight] - part.size, part.dtype)]

    # what stands in the file

    def numbers(self) -> bytes:
        """`Numbers` of the tables, and behind them the weights."""
        p, n = self._potential, len(self._potential.species)
        core = self._radii if p.config.core_repulsion else np.zeros((n, n))
        parts = [np.array(p.reference_energies), np.array(p.scales), core, *self._domain()]
        whole = np.concatenate([np.ravel(part).astype("<f8") for part in parts])
        return whole.tobytes() + np.concatenate(self._parts).tobytes()

    def _domain(self) -> list[np.ndarray]:
        p, n = self._potential, len(self._potential.species)
        known = p.uncertainty
        form = np.zeros((1, self._width)) if known is None else known.atoms.double().cpu().numpy()
        if p.domain is None:
            return [np.zeros((n, n)), np.zeros((2, n)), np.zeros(2), form]
        limits = DomainCheck(p).limits(torch.tensor(p.species))
        closest = DISTANCE * p.domain.closest.double().cpu().numpy()
        closest = np.where(np.isinf(closest), self._radii, closest)
        leverage = np.inf if p.uncertainty is None else limits.leverage
        return [closest, limits.neighbors, np.array([leverage, limits.force]), form]

    @property
    def _radii(self) -> np.ndarray:
        return self._potential.get_buffer("core_radii").double().cpu().numpy()

    @property
    def _width(self) -> int:
        return self._plan.features.array.size

    # what stands in the library

    def tables(self) -> str:
        """plan.h."""
        return "\n".join(
            [
                "/* Written by segnn export: the network as steps; see segnn.c for the structures. */",
                *self._constants(),
                *(f"void {name}({_ROWS});" for name in self.kernels.values()),
                _table_in_c("Storage", "storages", [self._storage_row(s) for s in self._storages]),
                _table_in_c("Panel", "panels", [self._panel_row(p) for p in self._panels]),
                *self._step_tables(),
                *self._stage_tables(),
            ]
        )

    def _constants(self) -> list[str]:
        p, config = self._potential, self._potential.config
        lonely, cues = p.domain is not None and p.domain.lone_atoms, numbers_of(config.cues)
        numbers = {
            "CUTOFF": repr(float(config.cutoff)),
            "KNOT_DISTANCE": repr(float(self._knot)),
            "LAST_KNOT": round(config.cutoff / self._knot) - 1,
            "EDGES_PER_THREAD": EDGES_PER_THREAD,
            "REPELS": int(config.core_repulsion),
            "CORE_BLUR": CORE_BLUR,
            "CORE_SWITCH": CORE_SWITCH,
            "COULOMB": repr(COULOMB),
            "HAS_DOMAIN": int(p.domain is not None),
            "HAS_FORM": int(p.uncertainty is not None),
            "ALONE_IS_INSIDE": int(lonely),
            "WIDTH": self._width,
            "N_CUES": len(cues),
            "N_RAW": self._length,
            "N_SPECIES": len(p.species),
            "N_STORAGES": len(self._storages),
            "N_PANELS": len(self._panels),
            "N_STEPS": sum(map(len, self._steps)),
            "N_SEGMENTS": len(self._segments),
            "N_STAGES": len(self.stages()),
            **{name: self._at[self._places[place]] for name, place in self._known_places().items()},
        }
        symbols = [f'"{chemical_symbols[z]}"' for z in p.species]
        return [
            *(f"#define {name} {value}" for name, value in numbers.items()),
            _STRUCTURES,
            _array_in_c("char *const", "symbols", symbols),
            _array_in_c("int", "atomic_numbers", p.species),
            _array_in_c("char *const", "cue_names", [in_quotes(name.encode()) for name, *_ in cues] or ["NULL"]),
            _array_in_c("double", "cue_zeros", [zero for _, zero, _ in cues] or [0.0]),
            _array_in_c("double", "cue_units", [unit for *_, unit in cues] or [1.0]),
        ]

    def _known_places(self) -> dict[str, Place]:
        plan = self._plan
        known = {"VECTORS": plan.vectors, "GRADIENT": plan.gradient, "EPSILON": plan.epsilon, "WEIGHTS": plan.weight}
        return {**known, "FEATURES": plan.features, "CUES": plan.cues or plan.weight}

    def _storage_row(self, storage: Storage) -> list:
        where = "SCRATCHED" if storage.where == "scratch" else KINDS.index(storage.where)
        return [where, storage.size, int(storage in self._private)]

    def _panel_row(self, panels: Panels) -> list:
        inner, outer = shape_of(*panels)
        return [self._raw[panels.weight], inner, outer, int(panels.transposed), repr(float(panels.weight.scale))]

    def _step_tables(self) -> list[str]:
        slots: list[list] = []
        steps: list[list] = []
        segments: list[list] = []
        for segment, its_steps in zip(self._segments, self._steps, strict=True):
            segments.append([KINDS.index(segment.where), int(segment.summed), len(its_steps)])
            for step in its_steps:
                steps.append(self._step_row(step, len(slots)))
                slots += [self._slot_row(x) for x in step.tensors]
        return [
            _table_in_c("PlannedSlot", "planned_slots", slots),
            _table_in_c("PlannedStep", "planned_steps", steps),
            _table_in_c("PlannedSegment", "planned_segments", segments),
        ]

    def _step_row(self, step: StepInC, first_slot: int) -> list:
        function = "NULL" if step.function is None else self.kernels[step.function]
        counts = [step.n_in, len(step.tensors) - step.n_in, first_slot]
        numbers = ("rows", "inner", "outer", "a_stride", "d_stride", "c_stride", "add")
        return [int(step.numbers["op"]), function, *counts, *(int(step.numbers.get(name, 0)) for name in numbers)]

    def _slot_row(self, x: TensorInC) -> list:
        if isinstance(x.of, Panels):
            return ["IN_PANELS", self._panels[x.of], 0, 0, 0, 0]
        if isinstance(x.of, Weight):
            return ["AS_IT_IS", self._raw[x.of], 0, 0, 0, 0]
        if isinstance(x.of, Place):
            return ["IN_STORAGE", self._at[self._places[x.of]], x.offset, int(x.memory), x.where, int(x.clear)]
        return ["NOTHING", 0, 0, 0, 0, 0]

    def _stage_tables(self) -> list[str]:
        exchanged: list[int] = []
        rows: list[list] = []
        for stage in self.stages():
            rows.append([stage.first, stage.size, stage.direction, len(exchanged), len(stage.exchanged)])
            exchanged += [self._at[storage] for storage in stage.exchanged]
        return [_array_in_c("int", "exchanged", exchanged or [0]), _table_in_c("Stage", "stages", rows)]

    def stages(self) -> list[Stage]:
        """Segments between exchanges: what senders have is known of a process's own atoms only."""
        known: set[Place] = {self._plan.cues} if self._plan.cues is not None else set()  # those who call tell it of all
        found, first = [], 0
        for k, segment in enumerate(self._segments):
            asked = [x for x in dict.fromkeys(segment.asked_for()) if isinstance(x, Place) and x not in known]
            if asked:
                found.append(Stage(first, k - first, "SEGNN_FORWARD", self._of(asked)))
                known.update(asked)
                first = k
            if back := [x for x in dict.fromkeys(segment.sent_back()) if isinstance(x, Place)]:
                found.append(Stage(first, k + 1 - first, "SEGNN_REVERSE", self._of(back)))
                first = k + 1
        return [*found, Stage(first, len(self._segments) - first, "SEGNN_NO_EXCHANGE", [])]

    def _of(self, places: list[Place]) -> list[Storage]:
        return list(dict.fromkeys(self._places[x] for x in places))


def in_quotes(text: bytes) -> str:
    """As C has it, byte by byte: what stands in a model's file is no code."""
    return '"' + "".join(f"\\{byte:03o}" for byte in text) + '"'


def numbers_of(cues: "tuple[Cue, ...]") -> list[tuple[str, float, float]]:
    """Of each number that an atom is told: its name, what says nothing, and its unit."""
    axes = {1: [""], 3: ["_x", "_y", "_z"]}
    return [
        (f"{cue.name}{axis}", float(cue.name == "spin"), float(cue.unit))
        for cue in cues
        if cue.size
        for axis in axes[cue.size]
    ]


_ROWS = "int64_t, int64_t, const int64_t *const *, const T *const *, T *const *"
_STRUCTURES = """
enum { NOTHING, IN_PANELS, AS_IT_IS, IN_STORAGE };
enum { SCRATCHED = 3 }; /* rows of a chunk; others as in KINDS: nodes, pairs, edges */
typedef struct { int where; int64_t size; int is_private; } Storage;
typedef struct { int64_t raw, inner, outer; int transposed; double scale; } Panel;
typedef struct { int of; int64_t number, offset; int memory, where, clear; } PlannedSlot;
typedef struct {
  int op; rows_function function; int64_t n_in, n_out, first_slot, rows, inner, outer, a_stride, d_stride, c_stride;
  int add;
} PlannedStep;
typedef struct { int where, summed; int64_t n_steps; } PlannedSegment;
typedef struct { int64_t first_segment, n_segments; int direction, first_exchanged, n_exchanged; } Stage;
typedef struct { /* of the file; eV and Angstrom */
  double reference[N_SPECIES], scale[N_SPECIES], core[N_SPECIES][N_SPECIES];
  double closest[N_SPECIES][N_SPECIES], neighbors[2][N_SPECIES], leverage, force;
  double form[HAS_FORM ? WIDTH : 1][WIDTH];
} Numbers;
"""


def _table_in_c(kind: str, name: str, rows: list[list]) -> str:
    lines = (f"  {{{', '.join(map(str, row))}}}," for row in rows)
    return "\n".join([f"static const {kind} {name}[] = {{", *lines, "};"])


def _array_in_c(kind: str, name: str, values: list) -> str:
    return f"static const {kind} {name}[] = {{{', '.join(map(str, values))}}};"
