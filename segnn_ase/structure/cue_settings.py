"""Declarations of physical cues: what a potential is told of a structure besides its atoms and its cell."""

from typing import Any, Literal

from pydantic import Field, model_validator

from segnn_ase.base.settings import Settings

OWN = ("numbers", "positions", "energy", "forces", "stress", "masses", "tags")
VELOCITIES = ("velocities", "velocity", "momenta", "momentum", "momentums")
KNOWN: dict[str, dict[str, Any]] = {  # names of ASE, and what they are
    "initial_charges": {"kind": "scalar"},
    "initial_magmoms": {"kind": "axial", "time_reversal": -1},
    "charge": {"kind": "integer", "per": "graph", "default": 0.0},
    "spin": {"kind": "integer", "per": "graph", "default": 1.0},
    "external_field": {"kind": "polar", "per": "graph", "default": (0.0, 0.0, 0.0)},
}
FIELD = "external_field"
OF_FIELD = {  # labels of what a field does, by names that they have in files
    "dipole": ("dipole", "polarization"),  # e Å, of the cell where there is one
    "polarizability": ("polarizability",),  # e Å^2/V
    "born": ("born_effective_charges", "born_charges"),  # e, row by row dP_i/du_j
}
INPUTS = (*KNOWN, "magnetic_field")  # what frames with the same atoms may differ in
CONJUGATES = {  # what a label of -dE/dcue or dE/dcue is called, and its sign
    "initial_magmoms": ("magnetic_forces", -1.0),
    "initial_charges": ("electronegativities", 1.0),
}
LABELS_OF_CUES = (*(name for name, _ in CONJUGATES.values()), *(name for names in OF_FIELD.values() for name in names))
WHY_NOT = (
    "an energy that depends on velocities is no potential: forces are no longer its gradient, it is not the same in a "
    "moving frame, and thermostats are wrong. Learned time-steppers take them (segnn_ase.dynamics)"
)


class Cue(Settings):
    """One cue; what may be built of it follows from its kind, and from whether it is odd under time reversal.

    A scalar q_i steers its atom, and q_i q_j the message between two; so do the components of a polar vector (of 1o),
    without products. Of an axial vector that is odd under time reversal (a moment m_i) only bilinear forms occur:
    |m_i|^2 and m_i . m_j, and with spin_orbit all of m_i (x) m_i and m_i (x) m_j, which turn with the atoms. An integer
    of the whole structure steers each of its atoms: energies are then not size-consistent.
    """

    name: str = Field(
        min_length=1, description="where it is in ASE: a name in atoms.arrays, or per graph in atoms.info"
    )
    per: Literal["node", "graph"] = Field("node", description="whether each atom has one, or the structure")
    kind: Literal["scalar", "polar", "axial", "integer"] = Field(description="how it transforms")
    time_reversal: Literal[1, -1] = Field(1, description="-1: it changes sign when time runs backwards")
    spin_orbit: bool = Field(False, description="whether an axial vector is coupled to the directions of space")
    scale: float = Field(1.0, gt=0, description="its natural size: values of this size are one to the network")
    default: float | tuple[float, ...] | Literal["error"] = Field(
        "error", description="what a structure without it has, or error: it is refused"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):  # as "initial_magmoms,spin_orbit=true"
            name, *settings = value.split(",")
            for one in settings:
                if "=" not in one:
                    raise ValueError(f"{one.strip()!r} is no SETTING=VALUE; every cue is given by itself")
            value = {"name": name.strip(), **{k.strip(): v.strip() for k, _, v in (s.partition("=") for s in settings)}}
            if " " in value.get("default", ""):  # as "default=0 0 1"
                value["default"] = value["default"].split()
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            if value["name"] in OWN:
                raise ValueError(
                    f"{value['name']} is what a potential has of every structure, or gives; expected others"
                )
            if value["name"].lower() in VELOCITIES:
                raise ValueError(f"{value['name']} cannot be a cue: {WHY_NOT}")
            known = KNOWN.get(value["name"], {})
            if "kind" not in value and not known:
                raise ValueError(f"kind is missing; expected one for {value['name']!r}, which is none of {[*KNOWN]}")
            value = {**known, **value}
        return value

    @model_validator(mode="after")
    def _consistent(self):  # each line a rule
        known = KNOWN.get(self.name)
        if known and any(getattr(self, key) != known.get(key, type(self).model_fields[key].default) for key in FIXED):
            raise ValueError(f"{self.name} is {known}; leave kind, per and time_reversal out")
        vector = self.kind in ("polar", "axial")
        if self.name == FIELD and self.scale != 1.0:
            raise ValueError(f"scale is {self.scale:g}; a field has none, as it acts on dipoles: leave it out")
        if self.kind == "integer" and isinstance(self.default, float) and not self.default.is_integer():
            raise ValueError(f"default is {self.default}; expected an integer, or 'error'")
        if self.kind == "polar" and self.time_reversal == -1:
            raise ValueError(f"a polar vector that changes sign with time is a velocity: {WHY_NOT}")
        if self.kind == "axial" and self.time_reversal == 1:
            raise ValueError("an axial vector needs time_reversal = -1: it is a magnetic moment")
        if not vector and self.time_reversal == -1:
            raise ValueError(f"time_reversal is -1 and kind is {self.kind!r}; expected an axial vector")
        if self.spin_orbit and self.kind != "axial":
            raise ValueError(f"spin_orbit is true and kind is {self.kind!r}; expected 'axial'")
        if (self.kind == "integer" and self.per == "node") or (vector and self.per == "graph" and self.name != FIELD):
            raise ValueError(f"kind is {self.kind!r}; expected per = {'node' if vector else 'graph'!r}")
        if isinstance(self.default, tuple) != vector and self.default != "error":
            raise ValueError(
                f"default is {self.default}; expected 'error' or {'three numbers' if vector else 'a number'}"
            )
        if isinstance(self.default, tuple) and len(self.default) != 3:
            raise ValueError(f"default is {self.default}; expected three numbers")
        return self

    @property
    def size(self) -> int:
        """Numbers that an atom has of it: none of a field, which acts on dipoles, and steers nothing."""
        if self.name == FIELD:
            return 0
        return 3 if self.kind in ("polar", "axial") else 1

    @property
    def unit(self) -> float:
        """What is one to the network: a vector as long as the scale has components of one."""
        return self.scale / max(self.size, 1) ** 0.5


FIXED = ("kind", "per", "time_reversal")


def check_cues(cues: tuple[Cue, ...]) -> tuple[Cue, ...]:
    """Raises ValueError for two of one name."""
    names = [cue.name for cue in cues]
    if len(set(names)) < len(names):
        raise ValueError(f"expected every cue once, not {names}")
    return cues


def names_read(cues: "tuple[Cue, ...]") -> tuple[str, ...]:
    """What is read beside a structure: all cues, and the charge, which decides about dipoles beside a field, and about
    electrons beside a multiplicity."""
    names = tuple(cue.name for cue in cues)
    return names if "charge" in names or not {FIELD, "spin"} & {*names} else (*names, "charge")
