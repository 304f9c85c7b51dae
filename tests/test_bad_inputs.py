"""Mistakes at every public entrance: a typed error that names the argument, its value and what is expected.

A row is a name, what is done, the error and a pattern of its message. Nothing may be written on the way.
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from helpers.command_line import TOML, assert_one_line_error, segnn
from helpers.dynamics import Morse, crystal
from helpers.frames import emt_atoms
from helpers.potentials import tiny_potential
from helpers.systems import copper, ethanol, slab

from segnn_ase import Potential, SEGNNCalculator, load_potential, save_potential
from segnn_ase.base.errors import ConfigError, DataError, DeviceError, ModelFileError, OutputError, StructureError
from segnn_ase.base.figures import plot_energy_drift, plot_learning_curve, plot_parity, plot_rdf
from segnn_ase.base.settings import read_toml
from segnn_ase.check.doctor import check
from segnn_ase.cli import read_structure
from segnn_ase.data.frames import LabelKeys, frame_from_atoms, read_frames
from segnn_ase.md.analysis import plot_run, radial_distribution
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.model.elements import parse_species
from segnn_ase.model.settings import ModelConfig, model_config
from segnn_ase.store.model_file import Committee, save_committee
from segnn_ase.structure.graph import graph_from_atoms
from segnn_ase.structure.neighbors import neighbor_list
from segnn_ase.structure.skin import SkinNeighbors
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.train.settings import DataConfig, OptimConfig, TrainConfig
from segnn_ase.train.start import finetune, train
from segnn_ase.verify import verify

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files that the rows name: good ones and bad ones."""
    folder = tmp_path_factory.mktemp("mistakes")
    ase.io.write(folder / "good.xyz", emt_atoms(4))
    ase.io.write(folder / "bare.xyz", [molecule("H2O")] * 2)
    ase.io.write(folder / "methane.xyz", emt_atoms(2, lambda: molecule("CH4")))
    ase.io.write(folder / "gold.xyz", emt_atoms(2, lambda: Atoms("Au2", [[0, 0, 0], [2.5, 0, 0]])))
    ase.io.write(folder / "start.xyz", molecule("H2O"))
    ase.io.write(folder / "cell.xyz", copper())
    (folder / "text.xyz").write_text("Dear frames,\n")
    (folder / "columns.xyz").write_text("1\nenergy=-1\nH 0 0 0 1 2 3\n")
    (folder / "boxless.xyz").write_text('1\npbc="T T T" energy=-1\nH 0 0 0\n')
    (folder / "kcal.xyz").write_text("1\nenergy=-1 energy_unit=calories\nH 0 0 0\n")
    (folder / "switch.xyz").write_text("1\nenergy=T\nH 0 0 0\n")
    (folder / "empty.xyz").write_text("")
    (folder / "config.toml").write_text(TOML.replace("train.xyz", "good.xyz"))
    (folder / "bad.toml").write_text("[data\n")
    (folder / "key.toml").write_text('[data]\ntrain = "good.xyz"\n[training]\nepoch = 3\n')
    keeps = TOML.replace("train.xyz", "good.xyz") + '[finetune]\nkeep = "nothing"\n'
    (folder / "keeps.toml").write_text(keeps)
    (folder / "flat.toml").write_text('data = "good.xyz"\ntraining = 3\n')
    save_potential(folder / "it.pt", tiny_potential())
    (folder / "cut.pt").write_bytes((folder / "it.pt").read_bytes()[:5000])
    (folder / "frames").mkdir()
    return folder


@pytest.fixture
def w(folder, monkeypatch, request) -> SimpleNamespace:
    """What the rows work with, in that folder; nothing there may have changed afterwards."""
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    request.addfinalizer(lambda: check_unchanged(folder, before))
    return SimpleNamespace(potential=tiny_potential(), folder=folder)


def check_unchanged(folder: Path, before: dict) -> None:
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def calc(model=None, **keywords):
    return lambda w: SEGNNCalculator(w.potential if model is None else model, **keywords)


def models(*members):
    return lambda w: SEGNNCalculator([w.potential if m == "it" else m for m in members])


def constructed(model):
    return lambda w: SEGNNCalculator(model)


DTYPE = r"; expected 'float32', 'float64' or None"
CALCULATOR = [
    ("no model", constructed(None), ConfigError, "model is None; expected a path"),
    ("number as model", constructed(3), ConfigError, "model is 3; expected a path"),
    ("structure as model", constructed(Atoms("H")), ConfigError, "model is Atoms.*expected a path"),
    ("empty name", constructed(""), FileNotFoundError, "model is '': there is no such file"),
    ("no such model", constructed("no.pt"), FileNotFoundError, r"model is 'no\.pt'.*no such file.*shipped are"),
    (
        "home of nobody",
        constructed("~nobody_here/m.pt"),
        FileNotFoundError,
        "model is .*, but ~nobody_here has no home",
    ),
    ("300 letters", constructed("x" * 300), FileNotFoundError, "model is 'x{300}': there is no such file"),
    ("zero in a name", constructed("a\0b"), FileNotFoundError, "model is 'a.x00b': there is no such file"),
    ("folder as model", constructed("frames"), FileNotFoundError, "model is 'frames'"),
    ("text as model", constructed("text.xyz"), ModelFileError, r"text\.xyz is not a readable model file"),
    ("cut model", constructed("cut.pt"), ModelFileError, r"cut\.pt is not a readable model file .truncated"),
    ("empty committee", models(), ConfigError, "model is an empty list"),
    ("nothing in committee", models("it", None), ConfigError, "model is None; expected a path"),
    ("committee without file", models("it", "no.pt"), FileNotFoundError, r"model is 'no\.pt'"),
    ("nested committee", models(["it.pt"]), ConfigError, r"model is \[\['it.pt'\]\]; expected a list of paths"),
    ("typo", calc(dtpye="float32"), ConfigError, "unknown keyword 'dtpye' of SEGNNCalculator: did you mean 'dtype'"),
    ("unknown keyword", calc(walrus=1), ConfigError, "unknown keyword 'walrus' .*: known are device, dtype"),
    ("dtype by other name", calc(dtype="double"), ConfigError, f"dtype is 'double'{DTYPE}"),
    ("half precision", calc(dtype="float16"), ConfigError, f"dtype is 'float16'{DTYPE}"),
    ("half precision of torch", calc(dtype=torch.float16), ConfigError, f"dtype is torch.float16{DTYPE}"),
    ("dtype of numpy", calc(dtype=np.float64), ConfigError, f"dtype is .*numpy.*{DTYPE}"),
    ("number as dtype", calc(dtype=64), ConfigError, f"dtype is 64{DTYPE}"),
    ("list as dtype", calc(dtype=["float32"]), ConfigError, rf"dtype is \['float32'\]{DTYPE}"),
    ("negative skin", calc(skin=-1.0), ConfigError, "skin is -1.0; expected 'auto', or zero or more Å"),
    ("thick skin", calc(skin="thick"), ConfigError, "skin is 'thick'; expected 'auto'"),
    ("nan skin", calc(skin=NAN), ConfigError, "skin is nan; expected 'auto'"),
    ("infinite skin", calc(skin=INF), ConfigError, "skin is inf; expected 'auto'"),
    ("no skin", calc(skin=None), ConfigError, "skin is None; expected 'auto'"),
    ("list as skin", calc(skin=[1.0]), ConfigError, r"skin is \[1.0\]; expected 'auto'"),
    ("unknown backend", calc(neighbor_backend="walrus"), ConfigError, "neighbor_backend is 'walrus'; .* matscipy"),
    ("no backend", calc(neighbor_backend=None), ConfigError, "neighbor_backend is None; expected 'auto'"),
    ("list as backend", calc(neighbor_backend=["matscipy"]), ConfigError, "neighbor_backend is .*; expected 'auto'"),
    ("accelerate yes", calc(accelerate="yes"), ConfigError, "accelerate is 'yes'; expected one of auto"),
    ("accelerate true", calc(accelerate=True), ConfigError, "accelerate is True; expected one of auto"),
    ("list as accelerate", calc(accelerate=["off"]), ConfigError, "accelerate is .*; expected one of auto"),
    ("tables off", calc(tables="off"), ConfigError, "tables is 'off'; expected True or False"),
    ("domain stop", calc(domain="stop"), ConfigError, "domain is 'stop'; expected one of warn, raise, ignore"),
    ("domain true", calc(domain=True), ConfigError, "domain is True; expected one of warn"),
    ("nonsmooth yes", calc(allow_nonsmooth="no"), ConfigError, "allow_nonsmooth is 'no'; expected True or False"),
    ("absent GPU", calc(device="cuda:99"), DeviceError, "device is 'cuda:99', but PyTorch .* sees .* use device='cpu'"),
    ("toaster", calc(device="toaster"), DeviceError, "device is 'toaster'; expected 'auto', 'cpu'"),
    ("empty device", calc(device=""), DeviceError, "device is ''; expected 'auto', 'cpu'"),
    ("no device", calc(device=None), DeviceError, "device is None; expected 'auto', 'cpu'"),
    ("number as device", calc(device=-3), DeviceError, "device is -3; expected 'auto', 'cpu'"),
    ("meta device", calc(device="meta"), DeviceError, "device is 'meta'; expected 'auto', 'cpu'"),
    ("list as device", calc(device=["cpu"]), DeviceError, r"device is \['cpu'\]; expected 'auto', 'cpu'"),
    ("set later", lambda w: SEGNNCalculator(w.potential).set(skin=1.0), ConfigError, "set has 'skin'; .*constructed"),
]


def evaluate(*args, **keywords):
    return lambda w: SEGNNCalculator(w.potential).evaluate(*args, **keywords)


def hessian(atoms):
    return lambda w: SEGNNCalculator(w.potential).get_hessian(atoms)


def descriptors(atoms):
    return lambda w: SEGNNCalculator(w.potential).get_descriptors(atoms)


def forces(atoms):
    def ask(w):
        atoms.calc = SEGNNCalculator(w.potential)
        atoms.get_forces()

    return ask


def numbered(number: int) -> Atoms:
    atoms = ethanol()
    atoms.numbers[4] = number
    return atoms


def at(value: float) -> Atoms:
    atoms = ethanol()
    atoms.positions[5, 1] = value
    return atoms


def in_cell(cell, pbc=True) -> Atoms:
    return Atoms("Cu", cell=cell, pbc=pbc)


EXPLODED = r"positions of atom 5 are \[.*\]; expected"
EVALUATION = [
    ("no structures", evaluate(None), ConfigError, "structures is None; expected Atoms"),
    ("number as structures", evaluate(3), ConfigError, "structures is 3; expected Atoms"),
    ("numbers in structures", evaluate([3]), ConfigError, "structure 0 is 3; expected Atoms"),
    ("a path as structures", evaluate("good.xyz"), ConfigError, "structures is 'good.xyz'; expected Atoms"),
    ("paths as structures", evaluate([ethanol(), "a.xyz"]), ConfigError, "structure 1 is 'a.xyz'; expected Atoms"),
    ("empty structure", evaluate([ethanol(), Atoms()]), StructureError, "structure 1: atoms is empty"),
    ("gold in many", evaluate([ethanol(), Atoms("Au")]), StructureError, "structure 1: atom 0 is Au"),
    ("dipole of many", evaluate([ethanol()], ["dipole"]), ConfigError, "properties has 'dipole'; expected of energy"),
    ("no properties", evaluate([ethanol()], None), ConfigError, "properties is None; expected of energy"),
    ("number as properties", evaluate([ethanol()], 3), ConfigError, "properties is 3; expected of energy"),
    ("number in properties", evaluate([ethanol()], [3]), ConfigError, "properties has 3; expected of energy"),
    ("dipole of a molecule", evaluate([ethanol()], "dipole"), ConfigError, "properties has 'dipole'"),
    ("hessian of a path", hessian("good.xyz"), ConfigError, "atoms is 'good.xyz'; expected Atoms"),
    ("hessian of many", hessian([ethanol()]), ConfigError, "atoms is .*; expected Atoms"),
    ("descriptors of a path", descriptors("good.xyz"), ConfigError, "atoms is 'good.xyz'; expected Atoms"),
    ("calculate nothing", lambda w: SEGNNCalculator(w.potential).calculate(), StructureError, "atoms is empty"),
    (
        "virials of a number",
        lambda w: SEGNNCalculator(w.potential).get_virials(3),
        ConfigError,
        "atoms is 3; expected Atoms",
    ),
    (
        "flux of a word",
        lambda w: SEGNNCalculator(w.potential).get_heat_flux("x"),
        ConfigError,
        "atoms is 'x'; expected Atoms",
    ),
    ("flux of none", lambda w: SEGNNCalculator(w.potential).get_heat_flux(), StructureError, "atoms is empty"),
    (
        "flux with a number",
        lambda w: SEGNNCalculator(w.potential).get_heat_flux(molecule("H2O"), convective=1),
        ConfigError,
        "convective is 1; expected True or False",
    ),
    ("element 0", forces(numbered(0)), StructureError, "atom 4 is X, which this potential does not know"),
    ("element 119", forces(numbered(119)), StructureError, "atom 4 has the atomic number 119; expected an element"),
    ("element 200", forces(numbered(200)), StructureError, "atom 4 has the atomic number 200"),
    ("element -1", forces(numbered(-1)), StructureError, "atom 4 has the atomic number -1"),
    ("1e300 Å", forces(at(1e300)), StructureError, f"{EXPLODED} less than"),
    ("1e15 Å", forces(at(1e15)), StructureError, f"{EXPLODED} less than"),
    ("infinite cell", forces(in_cell([INF, 3, 3])), StructureError, r"cell is .*inf.*; expected finite"),
    ("wire without vector", forces(in_cell([3, 0, 3], (0, 1, 0))), StructureError, "cell is .* Set atoms.cell"),
]


def load(model="it.pt", **keywords):
    return lambda w: load_potential(model, **keywords)


def save(path="new.pt", potential=None, **keywords):
    return lambda w: save_potential(path, potential or w.potential, **keywords)


FILES = [
    ("load nothing", load(None), ConfigError, "model is None; expected a path"),
    ("load a number", load(3), ConfigError, "model is 3; expected a path"),
    ("load what is not there", load("watr-pbe0"), FileNotFoundError, "model is 'watr-pbe0': there is no such file"),
    ("load a folder", load("frames"), FileNotFoundError, "model is 'frames'"),
    ("load text", load("config.toml"), ModelFileError, r"config\.toml is not a readable model file"),
    ("load to a toaster", load(device="toaster"), DeviceError, "device is 'toaster'; expected 'auto', 'cpu'"),
    ("load in half precision", load(dtype=torch.float16), ConfigError, "dtype is torch.float16; expected 'float32'"),
    ("load in what", load(dtype="double"), ConfigError, "dtype is 'double'; expected 'float32', 'float64' or None"),
    ("save a number", save(potential=3), ConfigError, "potential is 3; expected a Potential"),
    ("save a calculator", save(potential="it.pt"), ConfigError, "potential is 'it.pt'; expected a Potential"),
    ("save nowhere", save(None), ConfigError, "path is None; expected a path"),
    ("save below a file", save("text.xyz/new.pt"), OutputError, "cannot write 'text.xyz/new.pt'"),
    ("save over a folder", save("frames"), OutputError, "cannot write 'frames'"),
    (
        "metadata of numpy",
        save(metadata={"a": np.float64(1)}),
        ConfigError,
        r"metadata\['a'\] is .*expected tensors and",
    ),
    ("metadata list", save(metadata=[1]), ConfigError, r"metadata is \[1\]; expected a dict"),
]


def potential(species=(1, 8), config=None, **keywords):
    return lambda w: Potential(w.potential.config if config is None else config, species, **keywords)


SPECIES_ARE = "; expected different atomic numbers from 1 to 118"
POTENTIAL = [
    ("seed -1", potential(seed=-1), ConfigError, r"seed is -1; expected an integer from 0 to 2\^63 - 1"),
    ("seed 2^63", potential(seed=2**63), ConfigError, r"seed is 9223372036854775808; expected an integer from 0 to"),
    ("no species", potential([]), ConfigError, rf"species is \[\]{SPECIES_ARE}"),
    ("species None", potential(None), ConfigError, f"species is None{SPECIES_ARE}"),
    ("species twice", potential([1, 1]), ConfigError, rf"species is \[1, 1\]{SPECIES_ARE}"),
    ("element 0 as species", potential([0]), ConfigError, rf"species is \[0\]{SPECIES_ARE}"),
    ("element 119", potential([119]), ConfigError, rf"species is \[119\]{SPECIES_ARE}"),
    ("symbols", potential(["H", "O"]), ConfigError, rf"species is \['H', 'O'\]{SPECIES_ARE}"),
    ("half an element", potential([1.5]), ConfigError, rf"species is \[1.5\]{SPECIES_ARE}"),
    ("one E0", potential(reference_energies=[1.0]), ConfigError, r"reference_energies is \[1.0\]; expected 2 finite"),
    ("nan E0", potential(reference_energies=[NAN, 0]), ConfigError, "reference_energies is .nan.*; expected 2 finite"),
    ("words as E0", potential(reference_energies=["a", 0]), ConfigError, "reference_energies is .'a'.*; expected 2"),
    ("number as E0", potential(reference_energies=3), ConfigError, "reference_energies is 3; expected 2 finite"),
    ("three scales", potential(scales=[1.0] * 3), ConfigError, "scales is .*; expected 2 finite numbers"),
    ("infinite scale", potential(scales=[1.0, INF]), ConfigError, "scales is .*inf.*; expected 2 finite numbers"),
    ("dict as config", potential(config={"cutoff": 3.0}), ConfigError, "config is .*; expected a ModelConfig"),
    ("symbol of nothing", lambda w: parse_species(["Si", "Q"]), ConfigError, r"species has \['Q'\]; expected chemical"),
]


def settings(**overrides):
    return lambda w: model_config(**overrides)


MODEL = [
    (f"{name} = {value!r}", settings(**{name: value}), ConfigError, rf"setting 'model.{name}.* is .*: {message}")
    for name, value, message in (
        ("cutoff", -1.0, "Input should be greater than 0.5"),
        ("cutoff", 0, "Input should be greater than 0.5"),
        ("cutoff", 30.0, "Input should be less than or equal to 20"),
        ("cutoff", NAN, "Input should be"),
        ("cutoff", INF, "Input should be"),
        ("cutoff", "long", "Input should be a valid number"),
        ("cutoff", None, "Input should be a valid number"),
        ("interactions", 0, "Input should be greater than or equal to 1"),
        ("interactions", 9, "Input should be less than or equal to 8"),
        ("interactions", 1.5, "Input should be a valid integer"),
        ("message", "loud", "Input should be 'steerable', 'linear' or 'published'"),
        ("lmax_attr", -1, "Input should be greater than or equal to 0"),
        ("lmax_attr", 9, "Input should be less than or equal to 8"),
        ("n_radial", 0, "Input should be greater than or equal to 1"),
        ("n_radial", 65, "Input should be less than or equal to 64"),
        ("radial_hidden", "64", "Input should be a valid tuple"),
        ("radial_hidden", [0], "Input should be greater than or equal to 1"),
        ("radial_hidden", [10**9], "Input should be less than or equal to 4096"),
        ("body_order", 4, "Input should be less than or equal to 3"),
        ("readout_hidden", 0, "Input should be greater than or equal to 1"),
        ("smooth", "perhaps", "Input should be a valid boolean"),
        ("core_repulsion", 2, "Input should be a valid boolean"),
        ("hidden_irreps", 32, "Input should be a valid string"),
        ("hidden_irreps", "32x0q", "irreps is '32x0q'; expected e3nn notation"),
        ("hidden_irreps", "", "expected some 0e channels"),
        ("hidden_irreps", "8x1o", "expected some 0e channels"),
        ("hidden_irreps", "4x0e+8x1o", "expected no irrep with more channels than 0e"),
        ("hidden_irreps", "999999x0e", "expected at most 4096 channels"),
        ("hidden_irreps", "4x0e+1x9o", ".*degrees up to 8"),
    )
] + [
    ("model typo", settings(cutof=4.0), ConfigError, "unknown setting 'model.cutof': did you mean 'cutoff'"),
    ("model walrus", settings(walrus=4.0), ConfigError, "unknown setting 'model.walrus': known keys: body_order"),
    (
        "cue typo",
        settings(cues=[{"name": "spin", "knd": "scalar"}]),
        ConfigError,
        "unknown setting 'model.cues.0.knd': did",
    ),
    ("preset mace", settings(preset="mace"), ConfigError, "preset is 'mace'; expected one of segnn, fast"),
    ("preset None", settings(preset=None), ConfigError, "preset is None; expected one of segnn, fast"),
    ("preset list", settings(preset=["segnn"]), ConfigError, r"preset is \['segnn'\]; expected one of segnn, fast"),
    ("nonsmooth", settings(smooth=False), ConfigError, "smooth = false is only meaningful with message = 'published'"),
    ("published", settings(message="published"), ConfigError, "message = 'published' .* set body_order = 1"),
    ("ModelConfig(...)", lambda w: ModelConfig(cutoff=-1), ConfigError, "setting 'cutoff' is -1: Input should be"),
    ("ModelConfig.parse", lambda w: ModelConfig.parse([1]), ConfigError, "valid dictionary"),
]


def configured(**values):
    return lambda w: TrainConfig.parse({"data": {"train": "good.xyz"}, **values})


TRAINING = [
    (f"{name} = {value!r}", configured(training={name: value}), ConfigError, f"'training.{name}.* is .*: {message}")
    for name, value, message in (
        ("epochs", 0, "Input should be greater than or equal to 1"),
        ("epochs", "many", "Input should be a valid integer"),
        ("batch_size", 0, "Input should be greater than or equal to 1"),
        ("max_edges", 0, "Input should be greater than or equal to 1"),
        ("learning_rate", 0, "Input should be greater than 0"),
        ("learning_rate", INF, "Input should be a finite number"),
        ("beta2", 1.0, "Input should be less than 1"),
        ("warmup_steps", -1, "Input should be greater than or equal to 0"),
        ("weight_decay", -0.1, "Input should be greater than or equal to 0"),
        ("ema_decay", 1.0, "Input should be less than 1"),
        ("clip_norm", 0, "Input should be greater than 0"),
        ("energy_weight", -1, "Input should be greater than or equal to 0"),
        ("forces_weight", NAN, "Input should be"),
        ("stress_weight", "some", "Input should be a valid number"),
        ("patience", 0, "Input should be greater than or equal to 1"),
        ("validate_every", 0, "Input should be greater than or equal to 1"),
        ("save_minutes", -1, "Input should be greater than or equal to 0"),
        ("max_minutes", 0, "Input should be greater than 0"),
        ("committee", 0, "Input should be greater than or equal to 1"),
        ("committee", 2.5, "Input should be a valid integer"),
        ("rollout_steps", -1, "Input should be greater than or equal to 0"),
        ("rollout_every", 0, "Input should be greater than or equal to 1"),
        ("rollout_temperature", 0, "Input should be greater than 0"),
        ("select", "energy", "Input should be 'loss' or 'stability'"),
        ("seed", -1, "Input should be greater than or equal to 0"),
        ("device", 3, "Input should be a valid string"),
        ("dtype", "float16", "Input should be 'float32' or 'float64'"),
        ("freeze", "segnn", "Input should be a valid tuple"),
        ("tensorboard", "perhaps", "Input should be a valid boolean"),
        ("accelerate", "yes", "Input should be 'auto', 'off' or 'require'"),
    )
] + [
    ("section typo", configured(trainin={}), ConfigError, "unknown setting 'trainin': did you mean 'training'"),
    ("training typo", configured(training={"epoch": 3}), ConfigError, "'training.epoch': did you mean 'epochs'"),
    ("training as number", configured(training=3), ConfigError, "setting 'training' is 3: Input should be"),
    ("model typo", configured(model={"cutof": 3.0}), ConfigError, "'model.cutof': did you mean 'cutoff'"),
    ("model preset", configured(model={"preset": "mace"}), ConfigError, "preset is 'mace'; expected one of"),
    ("out", configured(out=3), ConfigError, "setting 'out' is 3: Input should be a valid string"),
    (
        "no weight at all",
        configured(training={"energy_weight": 0, "forces_weight": 0, "stress_weight": 0}),
        ConfigError,
        "energy_weight, forces_weight and stress_weight are all 0; expected one above",
    ),
    (
        "data typo",
        configured(data={"train": "a", "energykey": "e"}),
        ConfigError,
        "'data.energykey': did you mean 'ene",
    ),
    ("no train", configured(data={}), ConfigError, "setting 'data.train' is missing"),
    ("empty train", configured(data={"train": []}), ConfigError, "setting 'data.train' is .*: .*at least 1 item"),
    ("number as train", configured(data={"train": 3}), ConfigError, "setting 'data.train' is 3: Input should be"),
    ("data as text", configured(data="a.xyz"), ConfigError, "setting 'data' is 'a.xyz': Input should be"),
    ("fraction 1", configured(data={"train": "a", "valid_fraction": 1}), ConfigError, "valid_fraction' is 1: .* less"),
    ("fraction -1", configured(data={"train": "a", "valid_fraction": -1}), ConfigError, "valid_fraction' is -1: "),
    ("nan in table", configured(data={"train": "a", "reference_energies": {"H": NAN}}), ConfigError, "H' is nan: "),
    ("words in table", configured(data={"train": "a", "reference_energies": {"H": "x"}}), ConfigError, "H' is 'x': "),
    ("number as key", configured(data={"train": "a", "energy_key": 3}), ConfigError, "'data.energy_key' is 3: Input"),
    ("no data", lambda w: TrainConfig.parse({}), ConfigError, "setting 'data' is missing"),
    ("no settings", lambda w: TrainConfig.parse(None), ConfigError, "valid dictionary"),
    ("TrainConfig(...)", lambda w: TrainConfig(out=3, data={"train": "a"}), ConfigError, "setting 'out' is 3"),
    ("DataConfig(...)", lambda w: DataConfig(train=[]), ConfigError, "setting 'train' is .*: .*at least 1 item"),
    ("OptimConfig(...)", lambda w: OptimConfig(epoch=1), ConfigError, "unknown setting 'epoch': did you mean 'epochs'"),
    ("LabelKeys(...)", lambda w: LabelKeys(energie="E"), ConfigError, "unknown setting 'energie': did you mean 'ener"),
    ("TOML of nobody", lambda w: read_toml("~nobody_here/a.toml"), FileNotFoundError, "config is .* has no home"),
    ("no TOML file", lambda w: read_toml("no.toml"), FileNotFoundError, r"config is 'no\.toml', but there is no such"),
    ("bad TOML file", lambda w: read_toml("bad.toml"), ConfigError, r"config 'bad\.toml' is not valid TOML"),
    ("folder as TOML file", lambda w: read_toml("frames"), FileNotFoundError, "config is 'frames', which is a folder"),
]


def trained(model=None, **data):
    values = {"data": {"train": "good.xyz", **data}, "training": {"epochs": 1, "device": "cpu"}, "out": "new.pt"}
    return lambda w: train(TrainConfig.parse({**values, "model": model or {"preset": "schnet"}}), progress=False)


def training_with(**changes):
    values = {"data": {"train": "good.xyz"}, "training": {"epochs": 1, "device": "cpu"}, "out": "new.pt", **changes}
    return lambda w: train(TrainConfig.parse(values), progress=False)


def tuned(model="it.pt", architecture=None, **changes):
    values = {"data": {"train": "good.xyz"}, "training": {"epochs": 1, "device": "cpu"}, "out": "new.pt", **changes}
    values["model"] = architecture or {}
    return lambda w: finetune(model, TrainConfig.parse(values), progress=False)


def assessed(model="it.pt", paths=("good.xyz",), **keywords):
    return lambda w: evaluate_files(model, paths, **keywords)


RUNS = [
    ("train a dict", lambda w: train({"data": {}}), ConfigError, "config is .*; expected a TrainConfig"),
    ("train a path", lambda w: train("config.toml"), ConfigError, "config is 'config.toml'; expected a TrainConfig"),
    ("train on nothing", trained(train="no.xyz"), FileNotFoundError, r"data file is 'no\.xyz', but there is no such"),
    ("train on no name", trained(train=""), FileNotFoundError, "data file is '"),
    ("train on a folder", trained(train="frames"), FileNotFoundError, "data file is 'frames', which is a folder"),
    ("train on text", trained(train="text.xyz"), DataError, r"data file 'text\.xyz' cannot be read by ASE"),
    ("train on bare frames", trained(train="bare.xyz"), DataError, "no frame has an energy or forces.*name yours"),
    (
        "train by a mask",
        trained(forces_mask_key="mine"),
        DataError,
        "key for forces_mask is 'mine', but no frame has it",
    ),
    ("train by virials", trained(virial_key="mine"), DataError, "key for virial is 'mine', but no frame has it"),
    (
        "train by stress of molecules",
        trained(stress_key="forces"),
        DataError,
        "key for stress is 'forces', but no frame",
    ),
    ("train on unnamed columns", trained(train="columns.xyz"), DataError, "has 7 columns, but Properties=.* names 4"),
    ("train without a cell", trained(train="boxless.xyz"), DataError, "cell is .* a, b, c span no volume"),
    ("train on calories", trained(train="kcal.xyz"), DataError, "energy is in 'calories', which is no known unit"),
    ("train on a switch", trained(train="switch.xyz"), DataError, "energy of .* is .*True.*; expected numbers"),
    ("train by a key", trained(energy_key="mine"), DataError, "key for energy is 'mine', but no frame has it"),
    ("validate bare frames", trained(valid="bare.xyz"), DataError, "no frame has an energy or forces"),
    (
        "validate methane",
        trained(valid="methane.xyz"),
        DataError,
        "validation set has C .*; the potential knows H, O from training.*that it lacks",
    ),
    ("test gold", trained(test="gold.xyz"), DataError, r"test gold\.xyz set has Au"),
    ("isolated nothing", trained(isolated_atoms="no.xyz"), FileNotFoundError, r"data file is 'no\.xyz'"),
    ("isolated bare", trained(isolated_atoms="bare.xyz"), DataError, "isolated atoms lack an energy of H, O. Add one"),
    ("E0 lack one", trained(reference_energies={"H": 0.0}), DataError, "reference energies lack O; give one for every"),
    ("E0 of Xx", trained(reference_energies={"H": 0.0, "O": 0.0, "Xx": 0.0}), ConfigError, r"species has \['Xx'\]"),
    (
        "out without suffix",
        training_with(out="model"),
        ConfigError,
        r"out is 'model'; expected a name that ends in \.pt",
    ),
    ("seed 2^64", training_with(training={"seed": 2**64}), ConfigError, "'training.seed' is .*: Input should be less"),
    ("out of 300 letters", training_with(out="x" * 300 + ".pt"), OutputError, "cannot write '.*: File name too long"),
    ("out with zero", training_with(out="a\0b.pt"), OutputError, "cannot write 'a.x00b"),
    ("out exists", training_with(out="it.pt"), ConfigError, r"out is 'it\.pt', which exists .*rename or remove"),
    ("train on a toaster", training_with(training={"device": "toaster"}), DeviceError, "device is 'toaster'; expected"),
    (
        "freeze a walrus",
        tuned(training={"freeze": ["walrus"]}),
        ConfigError,
        "freeze has 'walrus', .* parts are .*segnn",
    ),
    ("freeze all", tuned(training={"freeze": ["segnn", "readout"]}), ConfigError, "freeze is .*: nothing is left to"),
    ("tune a dict", lambda w: finetune("it.pt", {}), ConfigError, "config is {}; expected a TrainConfig"),
    ("tune nothing", tuned(None), ConfigError, "model is None; expected a path"),
    ("tune what is not there", tuned("no.pt"), FileNotFoundError, r"model is 'no\.pt': there is no such file"),
    (
        "tune another model",
        tuned(architecture={"cutoff": 3.0}),
        ConfigError,
        "fine-tuning keeps the architecture of it.pt",
    ),
    ("tune, not on gold", tuned(data={"train": "good.xyz", "valid": "gold.xyz"}), DataError, r"validation set has Au"),
    ("assess nothing", assessed(paths=()), ConfigError, "paths is .*; expected at least one"),
    ("assess a number", assessed(paths=3), ConfigError, "paths is 3; expected"),
    ("assess one path that is not there", assessed(paths="no.xyz"), FileNotFoundError, r"data file is 'no\.xyz'"),
    ("assess bare frames", assessed(paths=["bare.xyz"]), DataError, "no frame has an energy or forces"),
    ("assess gold", assessed(paths=["gold.xyz"]), DataError, r"gold\.xyz set has Au"),
    ("assess on a toaster", assessed(device="toaster"), DeviceError, "device is 'toaster'; expected"),
    ("assess by a text", assessed("text.xyz"), ModelFileError, r"text\.xyz is not a readable model file"),
    ("assess by keys", assessed(keys={"energy": "E"}), ConfigError, "keys is .*; expected LabelKeys"),
]


def md_config(**values):
    return lambda w: MDConfig(**values)


def dynamics(atoms, **values):
    return lambda w: run_md(atoms() if callable(atoms) else atoms, MDConfig(steps=1, **values), progress=False)


def with_morse(change) -> Atoms:
    atoms = crystal()
    change(atoms)
    return atoms


def massless():
    return with_morse(lambda atoms: atoms.set_masses([0.0] + [1.0] * 31))


def infinite_momenta():
    return with_morse(lambda atoms: atoms.set_momenta(np.full((32, 3), INF)))


def constrained():
    return with_morse(lambda atoms: atoms.set_constraint(FixAtoms([0])))


def slab_of_morse():
    return with_morse(lambda atoms: atoms.set_pbc((True, True, False)))


def without_stress():
    return with_morse(lambda atoms: setattr(atoms.calc, "implemented_properties", ["energy", "forces"]))


def beyond(number: int) -> Atoms:
    return with_morse(lambda atoms: atoms.numbers.__setitem__(1, number))


def no_atoms():
    return Atoms(calculator=Morse())


MD = [
    (f"{name} = {value!r}", md_config(**{name: value}), ConfigError, rf"setting '{name}' is .*: {message}")
    for name, value, message in (
        ("ensemble", "nvt", "expected one of nve, langevin, bussi, nhc, npt"),
        ("ensemble", 3, "Input should be a valid string"),
        ("timestep", 0, "Input should be greater than 0"),
        ("timestep", 21.0, "Input should be less than or equal to 20"),
        ("timestep", NAN, "Input should be"),
        ("timestep", "short", "Input should be a valid number"),
        ("steps", -1, "Input should be greater than or equal to 0"),
        ("steps", 1.5, "Input should be a valid integer"),
        ("temperature", 0, "Input should be greater than 0"),
        ("temperature", INF, "Input should be a finite number"),
        ("pressure", INF, "Input should be a finite number"),
        ("friction", 2.0, "Input should be less than or equal to 1"),
        ("tdamp", 0, "Input should be greater than 0"),
        ("pdamp", NAN, "Input should be"),
        ("npt_cell", "cubic", "Input should be 'isotropic' or 'full'"),
        ("velocities", "fast", "Input should be 'auto', 'maxwell' or 'keep'"),
        ("seed", -1, "Input should be greater than or equal to 0"),
        ("log", 3, "Input should be a valid string"),
        ("log_every", 0, "Input should be greater than or equal to 1"),
        ("save_every", 0, "Input should be greater than or equal to 1"),
        ("checkpoint_every", 0, "Input should be greater than or equal to 1"),
        ("max_temperature", 0, "Input should be greater than 0"),
        ("max_energy_drift", -1, "Input should be greater than 0"),
        ("max_forces_std", 0, "Input should be greater than 0"),
    )
] + [
    ("no time", md_config(max_minutes=0), ConfigError, "'max_minutes' is 0: Input should be greater than 0"),
    ("domain of MD", md_config(stop_outside_domain="perhaps"), ConfigError, "valid boolean"),
    ("MD typo", md_config(temperatur=300), ConfigError, "unknown setting 'temperatur': did you mean 'temperature'"),
    ("log as text", md_config(log="md.txt"), ConfigError, r"log is 'md\.txt'; expected a name that ends in \.csv"),
    ("xtc", md_config(trajectory="md.xtc"), ConfigError, r"trajectory is 'md\.xtc'; expected .*\.traj"),
    ("pickle", md_config(restart="md.pkl"), ConfigError, r"restart is 'md\.pkl'; expected .*\.npz"),
    ("tdamp", md_config(ensemble="nhc", tdamp=4), ConfigError, "tdamp is 4.0 fs; expected at least 10 time steps"),
    (
        "friction in 1/ps",
        md_config(friction=1, timestep=2),
        ConfigError,
        "friction is 1 1/fs and timestep 2 fs; expected a product of 0.5 at most, .* 1 1/ps would be 0.001",
    ),
    ("pdamp", md_config(ensemble="npt", pdamp=20), ConfigError, "pdamp is 20.0 fs; expected at least tdamp"),
    (
        "pressure",
        md_config(pressure=1.0),
        ConfigError,
        "pressure is 1.0 GPa, but ensemble 'langevin' has none: use 'npt'",
    ),
    ("tdamp of bussi", md_config(ensemble="bussi", tdamp=4), ConfigError, "tdamp is 4.0 fs; expected at least 10 time"),
    (
        "drift",
        md_config(ensemble="langevin", max_energy_drift=0.1),
        ConfigError,
        "max_energy_drift is set, but ensemble 'langevin' conserves no energy: remove it",
    ),
    ("seed 2^63", md_config(seed=2**63), ConfigError, "setting 'seed' is 9223372036854775808: Input should be less"),
    ("element 119", dynamics(lambda: beyond(119)), ConfigError, "atom 1 has the atomic number 119; expected up to 118"),
    ("element 1000", dynamics(lambda: beyond(1000)), ConfigError, "atom 1 has the atomic number 1000; expected up"),
    ("element -1", dynamics(lambda: beyond(-1)), ConfigError, "atom 1 has the atomic number -1; expected up to 118"),
    ("log of 300 letters", dynamics(crystal, log="x" * 300 + ".csv"), OutputError, "cannot write '.*: File name too"),
    ("trajectory with zero", dynamics(crystal, trajectory="a\0b.xyz"), OutputError, "cannot write 'a.x00b.xyz': "),
    ("run nothing", dynamics(None), ConfigError, "atoms is None; expected Atoms"),
    ("run a path", dynamics("start.xyz"), ConfigError, "atoms is 'start.xyz'; expected Atoms"),
    ("run a list", dynamics([bulk("Cu")]), ConfigError, "atoms is .*; expected Atoms"),
    ("run a dict", lambda w: run_md(crystal(), {"steps": 1}), ConfigError, "config is .*; expected an MDConfig"),
    ("no config", lambda w: run_md(crystal(), None), ConfigError, "config is None; expected an MDConfig"),
    ("no calculator", dynamics(lambda: bulk("Cu")), ConfigError, "atoms has no calculator: set atoms.calc"),
    ("no atoms", dynamics(no_atoms), ConfigError, "atoms is empty"),
    ("massless", dynamics(massless), ConfigError, r"masses of atoms \[0\] are zero; set_masses"),
    ("infinite momenta", dynamics(infinite_momenta), ConfigError, "momenta of atom 0 are .*; expected finite"),
    ("npt of a slab", dynamics(slab_of_morse, ensemble="npt"), ConfigError, "'npt' needs pbc in three directions"),
    ("npt, no stress", dynamics(without_stress, ensemble="npt"), ConfigError, "'npt' needs the stress, which Morse"),
    (
        "drift without energy",
        dynamics(without_stress, ensemble="nhc", max_energy_drift=0.1),
        ConfigError,
        "max_energy_drift needs the free_energy; Morse does not implement it",
    ),
    ("nhc, constraints", dynamics(constrained, ensemble="nhc"), ConfigError, "'nhc' cannot hold constraints: remove"),
    (
        "bussi at rest",
        dynamics(crystal, ensemble="bussi", velocities="keep"),
        ConfigError,
        "momenta of atoms are zero, which 'bussi' cannot scale; expected",
    ),
    (
        "pairs without a trajectory",
        lambda w: plot_run(run_md(crystal(), MDConfig(steps=0), progress=False), "run", pairs=["Cu-Cu"]),
        ConfigError,
        r"pairs is \['Cu-Cu'\]; expected none for a run without a trajectory",
    ),
    ("no committee", dynamics(crystal, max_forces_std=0.1), ConfigError, "neither a committee"),
    ("no domain", dynamics(crystal, stop_outside_domain=True), ConfigError, "potential has no domain to compare with"),
    ("log below a file", dynamics(crystal, log="text.xyz/md.csv"), OutputError, r"cannot write 'text\.xyz/md\.csv'"),
    (
        "trajectory exists",
        dynamics(crystal, trajectory="good.xyz"),
        ConfigError,
        r"trajectory is 'good\.xyz', which ex",
    ),
    ("no structure", lambda w: read_structure("no.xyz"), FileNotFoundError, r"structure is 'no\.xyz', but there is no"),
    ("text as structure", lambda w: read_structure("text.xyz"), ConfigError, r"structure is 'text\.xyz', which ASE"),
]


def g(frames, pairs=("Cu-Cu",), r_max=4.0, **keywords):
    return lambda w: radial_distribution(frames, pairs, r_max, **keywords)


def pairs_of(positions=((0.0, 0, 0),), cell=None, pbc=False, cutoff=3.0, backend="matscipy"):
    return lambda w: neighbor_list(positions, np.eye(3) * 4 if cell is None else cell, pbc, cutoff, backend)


def frames_of(paths, keys=None):
    return lambda w: read_frames(paths, keys)


FUNCTIONS = [
    ("g of a molecule", g([molecule("H2O")]), ConfigError, "pbc of frame 0 is .*three periodic directions"),
    ("g of nothing", g([]), ConfigError, "frames is empty"),
    ("g of None", g(None), ConfigError, "frames is None; expected Atoms"),
    ("g of a path", g("good.xyz"), ConfigError, "frames is 'good.xyz'; expected Atoms"),
    ("g of numbers", g([3]), ConfigError, "frame 0 is 3; expected Atoms"),
    ("g of a text", g([bulk("Cu")], "Cu-Cu"), ConfigError, "pairs is 'Cu-Cu'; expected a list such as"),
    ("g without a dash", g([bulk("Cu")], ["CuCu"]), ConfigError, "pair 'CuCu' .*expected two elements such as 'O-H'"),
    ("g of half a pair", g([bulk("Cu")], ["Cu-"]), ConfigError, "pair 'Cu-' .*expected two elements"),
    ("g of three", g([bulk("Cu")], ["Cu-Cu-Cu"]), ConfigError, "pair 'Cu-Cu-Cu' .*expected two elements"),
    ("g of a number", g([bulk("Cu")], [3]), ConfigError, "pair 3 .*expected two elements"),
    ("g of what is not there", g([bulk("Cu")], ["Cu-O"]), ConfigError, "pair 'Cu-O' is not in a frame of Cu"),
    ("g to 0", g([bulk("Cu")], r_max=0), ConfigError, "r_max is 0; expected a positive number of Å"),
    ("g to nan", g([bulk("Cu")], r_max=NAN), ConfigError, "r_max is nan; expected a positive number"),
    ("g in no bins", g([bulk("Cu")], bins=0), ConfigError, "bins is 0; expected a positive integer"),
    ("g in half a bin", g([bulk("Cu")], bins=1.5), ConfigError, "bins is 1.5; expected a positive integer"),
    ("unknown search", pairs_of(backend="kd_tree"), ConfigError, "backend is 'kd_tree'; expected one of matscipy"),
    ("list as search", pairs_of(backend=["matscipy"]), ConfigError, "backend is .*; expected one of matscipy"),
    ("cutoff 0", pairs_of(cutoff=0.0), ConfigError, "cutoff is 0.0; expected a positive number of Å"),
    ("cutoff -1", pairs_of(cutoff=-1), ConfigError, "cutoff is -1; expected a positive number of Å"),
    ("cutoff nan", pairs_of(cutoff=NAN), ConfigError, "cutoff is nan; expected a positive number of Å"),
    ("cutoff inf", pairs_of(cutoff=INF), ConfigError, "cutoff is inf; expected a positive number of Å"),
    ("cutoff long", pairs_of(cutoff="long"), ConfigError, "cutoff is 'long'; expected a positive number of Å"),
    (
        "flat positions",
        pairs_of([0.0, 1.0, 2.0, 3.0]),
        StructureError,
        r"positions have shape \(4,\); expected \(N, 3\)",
    ),
    (
        "positions in 2D",
        pairs_of(np.zeros((3, 2))),
        StructureError,
        r"positions have shape \(3, 2\); expected \(N, 3\)",
    ),
    ("words as positions", pairs_of([["a", "b", "c"]]), StructureError, "positions are .*; expected numbers"),
    ("fine cell", pairs_of(cell=np.eye(3) * 0.01, pbc=True), StructureError, r"each of which would have about 2e\+08"),
    (
        "1000 atoms in 1 Å^3",
        pairs_of(np.random.default_rng(0).random((1000, 3)), np.eye(3), True),
        StructureError,
        "1000 atoms, each of which would have about .* neighbours within 3 Å; expected up to 1e.05. Check cell",
    ),
    (
        "sheared flat",
        pairs_of(cell=[[4, 0, 0], [4e9, 4, 0], [0, 0, 4]], pbc=True),
        StructureError,
        "periodic lattice vectors span no volume",
    ),
    ("cell of 2", pairs_of(cell=np.eye(2)), StructureError, r"cell has shape \(2, 2\); expected \(3, 3\)"),
    ("lengths as cell", pairs_of(cell=[4.0, 4.0, 4.0]), StructureError, r"cell has shape \(3,\); expected \(3, 3\)"),
    ("pbc of 2", pairs_of(pbc=(True, False)), StructureError, r"pbc is \(True, False\); expected one or three"),
    ("skin of cutoff 0", lambda w: SkinNeighbors(0.0, 0.5), ConfigError, "cutoff is 0.0; expected a positive number"),
    ("skin -1", lambda w: SkinNeighbors(4.0, -1.0), ConfigError, "skin is -1.0; expected 'auto'"),
    ("read None", frames_of(None), ConfigError, "paths is None; expected"),
    ("read a number", frames_of(3), ConfigError, "paths is 3; expected"),
    ("read numbers", frames_of([3]), ConfigError, r"paths is \[3\]; expected"),
    ("read of nobody", frames_of("~nobody_here/a.xyz"), FileNotFoundError, "data file is .*~nobody_here has no home"),
    ("read 300 letters", frames_of("x" * 300), FileNotFoundError, "data file is 'x{300}', but there is no such file"),
    ("read 300 letters @", frames_of("x" * 300 + "@:2"), FileNotFoundError, "data file is 'x{300}', but there is no"),
    ("read a device", frames_of("/dev/null"), FileNotFoundError, "data file is '/dev/null', which is a device or a"),
    ("read a folder", frames_of("frames"), FileNotFoundError, "data file is 'frames', which is a folder"),
    ("read by a text", frames_of("good.xyz", "energy"), ConfigError, "keys is 'energy'; expected LabelKeys"),
    ("read by a key", frames_of("good.xyz", LabelKeys(forces="F")), DataError, "key for forces is 'F', but no frame"),
    ("rdf.bmp", lambda w: plot_rdf("rdf.bmp", {"a": ([1], [1])}), ConfigError, r"rdf\.bmp'; expected .*\.png"),
    ("rdf without curves", lambda w: plot_rdf("rdf.png", {}), ConfigError, "curves is empty"),
    ("parity.txt", lambda w: parity("p.txt", [1], [1]), ConfigError, r"figure path is 'p\.txt'; expected .*\.png"),
    ("parity of 3 and 2", lambda w: parity("p.png", [1, 2, 3], [1, 2]), ConfigError, "forces: 3 reference and 2 pred"),
    ("parity of nothing", lambda w: parity("p.png", [], []), ConfigError, "forces: 0 reference and 0 predicted"),
    ("parity of nan", lambda w: parity("p.png", [1.0], [NAN]), ConfigError, "forces: .*; expected as many finite"),
    ("parity of words", lambda w: parity("p.png", ["a"], ["b"]), ConfigError, "forces: .*; expected as many finite"),
    ("curve of nothing", lambda w: plot_learning_curve("l.png", []), ConfigError, "history is empty"),
    ("curve without epochs", lambda w: plot_learning_curve("l.png", [{"lr": 1}]), ConfigError, "history .*'epoch'"),
    ("drift of nothing", lambda w: drift([], [], []), ConfigError, "time_fs has 0 .*; expected as many"),
    ("drift of 2 and 1", lambda w: drift([1, 2], [1], [1, 2]), ConfigError, "time_fs has 2 .*; expected as many"),
]


def parity(path, reference, predicted):
    plot_parity(path, reference, predicted, label="forces", unit="eV/Å")


def drift(time, energy, temperature):
    plot_energy_drift("d.png", time, energy, temperature, 0.0)


# Every argument of a public function with values of every wrong kind. A type is what one of them is an instance of:
# values of that type are left out for the argument.
WRONG_KINDS = {
    "None": None,
    "number": 3,
    "truth": True,
    "text": "no",
    "bytes": b"bytes",
    "list": [3],
    "dict": {"a": 1},
    "array": np.zeros(3),
    "function": math.sin,
    "structure": Atoms("H"),
}
NOT_A_PATH = r"expected .*a path"
PUBLIC = [  # argument, call with a value, the message, the kinds of values that are not wrong there
    (
        "model of SEGNNCalculator",
        lambda w, x: SEGNNCalculator(x),
        f"model is .*; {NOT_A_PATH}|there is no such file",
        "",
    ),
    ("device", lambda w, x: SEGNNCalculator(w.potential, device=x), "device is .*expected 'auto', 'cpu'", ""),
    ("backend", lambda w, x: SEGNNCalculator(w.potential, neighbor_backend=x), "neighbor_backend is .*expected", ""),
    ("model of load_potential", lambda w, x: load_potential(x), f"model is .*; {NOT_A_PATH}|there is no such file", ""),
    ("path of save_potential", lambda w, x: save_potential(x, w.potential), f"path is .*{NOT_A_PATH}", "text"),
    ("potential to save", lambda w, x: save_potential("new.pt", x), "potential is .*; expected a Potential", ""),
    ("committee to save", lambda w, x: save_committee("new.pt", x), "committee is .*; expected a Committee", ""),
    (
        "members to save",
        lambda w, x: save_committee("new.pt", Committee(x, {}, {})),
        "potentials is .*; expected a list of potentials",
        "",
    ),
    (
        "factors to save",
        lambda w, x: save_committee("new.pt", Committee([w.potential], x, {})),
        "factors is .*; expected a dict of numbers",
        "dict",
    ),
    ("keys of check", lambda w, x: check("good.xyz", keys=x), "keys is .*; expected LabelKeys", "None"),
    ("paths of check", lambda w, x: check(x), "paths is .*; expected a path or several|no such file", ""),
    ("valid of check", lambda w, x: check("good.xyz", valid=x), "paths is .*; expected a path|no such file", ""),
    (
        "isolated_atoms of check",
        lambda w, x: check("good.xyz", isolated_atoms=x),
        "isolated_atoms is .*; expected a path or None|no such file",
        "None",
    ),
    ("steps of verify", lambda w, x: verify(w.potential, molecule("H2O"), steps=x), "steps is .*; expected", "None"),
    ("atoms of verify", lambda w, x: verify(w.potential, x), "atoms is .*; expected Atoms", "structure"),
    (
        "seed of verify",
        lambda w, x: verify(w.potential, molecule("H2O"), seed=x),
        "seed is .*; expected an integer from 0",
        "number truth",
    ),
    ("atoms of a frame", lambda w, x: frame_from_atoms(x), "atoms is .*; expected Atoms", "structure"),
    ("atoms of a graph", lambda w, x: graph_from_atoms(x, 3.0), "atoms is .*; expected Atoms", "structure"),
    ("cell", lambda w, x: neighbor_list([[0, 0, 0]], x, True, 3.0), "cell (is|has shape) .*; expected", ""),
    ("history", lambda w, x: plot_learning_curve("l.png", x), "history is .*; expected a list of dicts", ""),
    ("path of a figure", lambda w, x: plot_rdf(x, {"a": ([1], [1])}), "figure path is .*; expected", ""),
    ("curves", lambda w, x: plot_rdf("rdf.png", x), "curves is .*; expected a dict of pairs", ""),
    ("result", lambda w, x: plot_run(x, "run"), "result is .*; expected what run_md returns", ""),
]
KINDS = [
    (
        f"{kind} as {argument}",
        lambda w, call=call, value=value: call(w, value),
        (ConfigError, DeviceError, StructureError, FileNotFoundError),
        message,
    )
    for argument, call, message, allowed in PUBLIC
    for kind, value in WRONG_KINDS.items()
    if kind not in allowed.split()
]


TABLE = {
    "kinds": KINDS,
    "calculator": CALCULATOR,
    "evaluation": EVALUATION,
    "files": FILES,
    "potential": POTENTIAL,
    "model": MODEL,
    "training": TRAINING,
    "runs": RUNS,
    "md": MD,
    "functions": FUNCTIONS,
}
ROWS = [pytest.param(*row, id=f"{part}: {name}") for part, rows in TABLE.items() for name, *row in rows]


@pytest.mark.parametrize("do, error, message", ROWS)
def test_a_mistake_is_a_typed_error_that_says_what_is_expected(w, do, error, message):
    with pytest.raises(error, match=message) as caught:
        do(w)
    assert "\n" not in str(caught.value)


USAGE = [  # arguments, the option or command that is named
    ("walrus", "walrus"),
    ("info", "MODEL"),
    ("md", "STRUCTURE"),
    ("md start.xyz", "--model"),
    ("evaluate it.pt", "FRAMES"),
    ("finetune", "MODEL"),
    ("train --epoch 3", "--epoch"),
    ("train --epochs many", "--epochs"),
    ("train --cutoff long", "--cutoff"),
    ("train --learning-rate fast", "--learning-rate"),
    ("train --seed 1.5", "--seed"),
    ("train --threads 0", "--threads"),
    ("train --radial-hidden wide", "--radial-hidden"),
    ("train --no-epochs", "--no-epochs"),
    ("md start.xyz --model it.pt --tdamp long", "--tdamp"),
    ("train config.toml extra", "extra"),
    ("finetune it.pt --epochs 1.5", "--epochs"),
    ("finetune it.pt --preset fast", "--preset"),
    ("evaluate it.pt good.xyz --threads -1", "--threads"),
    ("evaluate it.pt good.xyz --thread 1", "--thread"),
    ("md start.xyz --model it.pt --steps 1.5", "--steps"),
    ("md start.xyz --model it.pt --temperature hot", "--temperature"),
    ("md start.xyz --model it.pt --timestep", "--timestep"),
    ("md start.xyz --model it.pt --ensembl nve", "--ensembl"),
    ("md start.xyz --model it.pt --save-every x", "--save-every"),
    ("info it.pt --verbose", "--verbose"),
]


@pytest.mark.parametrize("arguments, named", USAGE)
def test_a_wrong_command_line_is_a_usage_error_that_names_the_option(w, arguments, named):
    result = segnn(*arguments.split())
    assert result.exit_code == 2 and named.lower() in result.stderr.lower()
    assert "Traceback" not in result.output


SHELL = [
    ("train", "setting 'data.train' is missing"),
    ("train no.toml", "config is 'no.toml', but there is no such file"),
    ("train frames", "config is 'frames', which is a folder"),
    ("train bad.toml", "config 'bad.toml' is not valid TOML"),
    ("train key.toml", "unknown setting 'training.epoch': did you mean 'epochs'?"),
    ("train flat.toml", "setting 'training' is 3"),
    ("train --train no.xyz", "data file is 'no.xyz', but there is no such file"),
    ("train --train good.xyz --preset mace", "preset is 'mace'; expected one of"),
    ("train --train good.xyz --epochs 0", "setting 'training.epochs' is 0"),
    ("train --train good.xyz --dtype float16", "setting 'training.dtype' is 'float16'"),
    ("train --train good.xyz --energy-key mine", "key for energy is 'mine', but no frame has it"),
    ("train --train good.xyz --virial-key mine", "key for virial is 'mine', but no frame has it"),
    ("evaluate it.pt good.xyz --forces-mask-key mine", "key for forces_mask is 'mine', but no frame has it"),
    ("train --train empty.xyz", "data file 'empty.xyz'"),
    ("convert no.xyz out.xyz", "data file is 'no.xyz', but there is no such file"),
    ("convert frames out.xyz", "data file is 'frames', which is a folder"),
    ("convert empty.xyz out.xyz", "data file 'empty.xyz'"),
    ("convert bare.xyz out.xyz", "no frame has an energy or forces"),
    ("convert good.xyz good.xyz", "frames would overwrite 'good.xyz'"),
    ("convert good.xyz out.traj", "expected a name that ends in .xyz or .extxyz"),
    ("convert good.xyz it.pt/out.xyz", "cannot write 'it.pt/out.xyz'"),
    ("convert good.xyz out.xyz --energy-key mine", "key for energy is 'mine', but no frame has it"),
    ("convert kcal.xyz out.xyz", "which is no known unit of it"),
    ("train --train bare.xyz", "no frame has an energy or forces"),
    ("train --train good.xyz --out model.h5", "expected a name that ends in .pt"),
    ("train --train good.xyz --device cuda:99 --out other.pt", "device is 'cuda:99'"),
    (
        "train --train good.xyz --reference-energies Cu",
        "setting 'data.reference_energies.Cu' is '': Input should be a valid number",
    ),
    ("train --train good.xyz --lmax-attr 9", "setting 'model.lmax_attr' is 9: Input should be less than or equal to 8"),
    ("train --train good.xyz --hidden-irreps 4x1o", "expected some 0e channels"),
    ("train --train good.xyz --rollout-steps 0 --select stability", "select is 'stability', but rollout_steps is 0"),
    ("finetune it.pt --train good.xyz --committee 2", "setting 'training.committee' is 2, but it.pt has 1 potential"),
    ("finetune it.pt --train good.xyz --valid gold.xyz", "or fine-tune one on frames of those that it lacks"),
    ("finetune it.pt --train good.xyz --replay gold.xyz --out other.pt", "replay set has Au"),
    ("finetune it.pt --train good.xyz --structures no.xyz --out other.pt", "data file is 'no.xyz'"),
    ("finetune it.pt --train good.xyz --l2-sp -1", "setting 'finetune.l2_sp' is -1.0"),
    ("finetune it.pt --train good.xyz --keep both", "setting 'finetune.keep' is 'both'"),
    ("train keeps.toml", "setting 'finetune' is"),
    ("finetune no.pt --train good.xyz", "model is 'no.pt': there is no such file"),
    ("finetune it.pt --config flat.toml", "setting 'data' is 'good.xyz'"),
    ("finetune it.pt --config config.toml", "fine-tuning keeps the architecture"),
    ("finetune it.pt --train good.xyz --freeze walrus --out other.pt", "freeze has 'walrus'"),
    ("evaluate it.pt gold.xyz", "gold.xyz set has Au"),
    ("evaluate it.pt bare.xyz", "no frame has an energy or forces"),
    ("evaluate it.pt no.xyz", "data file is 'no.xyz'"),
    ("evaluate it.pt good.xyz --device toaster", "device is 'toaster'; expected 'auto', 'cpu'"),
    ("evaluate config.toml good.xyz", "config.toml is not a readable model file"),
    ("info cut.pt", "cut.pt is not a readable model file (truncated"),
    ("info frames", "model is 'frames'"),
    ("md no.xyz --model it.pt", "structure is 'no.xyz', but there is no such file"),
    ("md text.xyz --model it.pt", "structure is 'text.xyz', which ASE cannot read"),
    ("md start.xyz --model no.pt", "model is 'no.pt': there is no such file"),
    ("md start.xyz --model it.pt --model no.pt", "model is 'no.pt': there is no such file"),
    ("md start.xyz --model it.pt --ensemble nvt", "setting 'ensemble' is 'nvt'"),
    ("md start.xyz --model it.pt --timestep 50", "setting 'timestep' is 50.0"),
    ("md start.xyz --model it.pt --ensemble npt", "ensemble 'npt' needs pbc in three directions"),
    ("md start.xyz --model it.pt --pressure 1", "pressure is 1.0 GPa, but ensemble 'langevin' has none"),
    ("md start.xyz --model it.pt --velocities fast", "setting 'velocities' is 'fast': Input should be 'auto'"),
    ("md start.xyz --model it.pt --trajectory md.xtc", "trajectory is 'md.xtc'; expected a name that ends in .traj or"),
    ("md start.xyz --model it.pt --domain maybe", "domain is 'maybe'; expected"),
    ("md start.xyz --model it.pt --dtype float16", "dtype is 'float16'; expected 'float32'"),
    ("md start.xyz --model it.pt --accelerate yes", "accelerate is 'yes'; expected one of"),
    ("md start.xyz --model it.pt --device toaster", "device is 'toaster'; expected 'auto', 'cpu'"),
    ("md start.xyz --model it.pt --out text.xyz/run", "cannot write 'text.xyz/run.csv'"),
    ("md start.xyz --model it.pt --rdf O-H", "pbc of frame 0 is [False, False, False]"),
    ("md cell.xyz --model it.pt --rdf CuCu", "pair 'CuCu' was given; expected two elements such as 'O-H'"),
    ("md cell.xyz --model it.pt --rdf Cu-O", "pair 'Cu-O' is not in a frame of Cu4"),
    ("md gold.xyz --model it.pt", "Train one, or fine-tune this one, on data that have that element"),
]


@pytest.mark.parametrize("arguments, message", SHELL)
def test_in_the_shell_a_mistake_is_one_line(w, arguments, message):
    assert_one_line_error(segnn(*arguments.split()), message)


def test_the_table_is_large_and_has_no_row_twice():
    rows = [row.id for row in ROWS] + [arguments for arguments, _ in (*USAGE, *SHELL)]
    assert len(rows) >= 600 and len(rows) == len(set(rows))


def test_the_same_calls_work_with_good_arguments(w, tmp_path):
    """Guards the table: its helpers are not wrong by themselves."""
    calc(device="cpu", dtype="float32", skin=0.3, tables=False, accelerate="off")(w)
    evaluate([ethanol(), slab()], "forces")(w)
    pairs_of()(w), g([bulk("Cu")])(w), frames_of(["good.xyz@:2", Path("good.xyz")])(w), potential()(w)
    assert assessed(paths="good.xyz", device="cpu")(w).keys() == {"good.xyz"}
    os.chdir(tmp_path)
    save(metadata={"a": [1]})(w)
    dynamics(crystal, log="md.csv", trajectory="md.xyz", restart="md.npz")(w)
