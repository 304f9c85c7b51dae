"""Several processes that train one model: the same as one, whatever is known of a frame, whoever dies."""

import itertools
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.frames import water_frames
from helpers.systems import rattled
from helpers.together import KINDS, TESTS, labelled_in_part, run_together, write_data
from helpers.trainings import history, weights
from hypothesis import given
from hypothesis import strategies as st

from segnn_ase.base.processes import cuts
from segnn_ase.data.batches import Item, Labels, collate_items, known_values, make_item
from segnn_ase.data.frames import Frame, frame_from_atoms
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.structure.cue_settings import names_read
from segnn_ase.structure.told import told_in
from segnn_ase.train.potential_goal import gradient_of_loss
from segnn_ase.train.settings import OptimConfig

IN_FIELD = model_config(hidden_irreps="4x0e+4x1o+4x2e", cutoff=3.0, cues=["external_field", "initial_charges"])
SCRIPT = str(TESTS / "helpers" / "together.py")


@given(st.lists(st.integers(0, 9), max_size=9), st.integers(1, 5))
def test_a_row_is_cut_so_that_the_largest_part_is_as_small_as_can_be(costs, parts):
    ends = cuts(costs, parts)
    assert len(ends) == parts + 1 and (ends[0], ends[-1]) == (0, len(costs)) and ends == sorted(ends)

    def largest(ends) -> int:
        return max(sum(costs[low:high]) for low, high in itertools.pairwise(ends))

    others = itertools.combinations_with_replacement(range(len(costs) + 1), parts - 1)
    assert largest(ends) <= max(min(largest([0, *some, len(costs)]) for some in others), 1)


def in_fields(n: int) -> list[Item]:
    """Crystals with labels of all that belongs to a field and to charges, some of them unknown."""
    items, rng = [], np.random.default_rng(0)
    for k in range(n):
        atoms = rattled(bulk("MgO", "rocksalt", 4.2, cubic=k % 2 == 0), seed=k)
        atoms.info["external_field"] = rng.normal(size=3)
        charges = rng.normal(size=len(atoms))
        atoms.set_initial_charges(charges - charges.mean())
        frame = Frame(atoms, None, None, None, "", (None, None, None), told=told_in(atoms, names_read(IN_FIELD.cues)))
        item = make_item(frame, IN_FIELD.cutoff, IN_FIELD.cues)
        shapes = {name: getattr(item.labels, name).shape for name in Labels._fields}
        labels = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
        for name in list(labels)[:: k + 2]:
            labels[name] = torch.full_like(labels[name], torch.nan)
        items.append(item._replace(labels=Labels(**labels)))
    return items


@pytest.mark.parametrize("kind", ["potential", "responses"])
def test_gradients_of_parts_add_up_to_that_of_the_batch(kind):
    settings = OptimConfig(accelerate="off", energy_weight=0.7, stress_weight=0.1, device="cpu")
    if kind == "potential":
        frames = [frame_from_atoms(atoms) for atoms in labelled_in_part()]
        items = [make_item(frame, 3.0) for frame in frames]
        potential = Potential(model_config("fast", hidden_irreps="4x0e+4x1o", cutoff=3.0), [1, 8, 29]).double()
    else:
        items, potential = in_fields(5), Potential(IN_FIELD, [8, 12]).double()
    potential.calibrate(collate_items(items).graph)
    gradient = gradient_of_loss(potential, items[0], settings)

    def found(parts: list[list[Item]], known) -> tuple[float, list]:
        potential.zero_grad()
        value = sum(gradient(collate_items(part), known) for part in parts)
        return value, [None if w.grad is None else w.grad.clone() for w in potential.parameters()]

    whole, expected = found([items], None)
    for cut in (1, 2, len(items) - 1):
        value, gradients = found([items[:cut], items[cut:]], tuple(known_values(items)))
        assert value == pytest.approx(whole, rel=1e-12)
        for one, other in zip(gradients, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()))


def rows(out: Path) -> np.ndarray:
    """The numbers of a history, NaN for none."""
    return np.array([[float(x or "nan") for x in row.values()] for row in history(out)])


SOME = ("model.pt", "p.pt", "s.pt")
ALL = (*SOME, "t.pt", "c.1.pt", "c.2.pt", "taught.pt", "rate.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, kind, names", [(4, "some", SOME), *(pytest.param(n, "all", ALL, marks=pytest.mark.proof) for n in (2, 4))]
)
def test_several_do_what_one_does(tmp_path, count, kind, names):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
        write_data(folder)
    KINDS[kind](alone)
    done = run_together(together, count, SCRIPT, kind, ".")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        np.testing.assert_allclose(rows(together / name), rows(alone / name), rtol=1e-6, atol=1e-9, err_msg=name)
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.slow
def test_when_one_dies_all_end_and_the_same_command_goes_on_to_the_same_bits(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name)
    assert run_together(tmp_path / "whole", 2, SCRIPT, "potential", ".").returncode == 0
    (tmp_path / "dies.py").write_text(
        f"""
import os, signal, sys
sys.argv = [{SCRIPT!r}, "potential", "."]
import segnn_ase.train.loop as loop
from helpers.together import configured, FEW, Path
from segnn_ase.cli import reported_errors
from segnn_ase.train.start import train
step, made = loop.next_step, []
def dies(*arguments):
    made.append(1)
    if os.environ["RANK"] == "1" and len(made) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
loop.next_step = dies
with reported_errors():
    train(configured(Path("."), save_minutes=0.0, **FEW), progress=False)
"""
    )
    done = run_together(tmp_path / "killed", 2, str(tmp_path / "dies.py"))
    assert done.returncode != 0
    assert "error: process 1 of 2: another process of this training has ended" in done.stderr
    assert not (tmp_path / "killed" / "model.last.pt").exists()
    again = run_together(tmp_path / "killed", 2, SCRIPT, "potential", ".")
    assert again.returncode == 0, again.stderr[-3000:]
    np.testing.assert_array_equal(rows(tmp_path / "killed" / "model.pt"), rows(tmp_path / "whole" / "model.pt"))
    for name in ("model.pt", "model.last.pt"):
        one, other = (weights(tmp_path / folder / name) for folder in ("killed", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.slow
def test_those_that_differ_and_errors_of_the_first_end_all(tmp_path):
    write_data(tmp_path)
    begin = """
import os, sys
from helpers.together import *
from segnn_ase.train import potential_goal, start
rank = int(os.environ["RANK"])
"""
    scripts = {
        "other seeds": "train(configured(Path('.'), **{**FEW, 'seed': rank}), progress=False)",
        "a bug": """
def fails(*_, **__):
    raise LookupError("a bug of the first")
start.read_data = fails
try:
    train(configured(Path('.'), **FEW), progress=False)
except LookupError as error:
    sys.exit(f"process {rank}: {error}")
""",
    }
    said = {
        "other seeds": "2 processes that were started together have different settings",
        "a bug": "a bug of the first",
    }
    for name, script in scripts.items():
        (tmp_path / "script.py").write_text(begin + script)
        done = run_together(tmp_path, 2, "script.py")
        assert done.returncode != 0 and said[name] in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_what_is_wrong_and_that_time_is_over_is_said_once(tmp_path):
    ase.io.write(tmp_path / "train.traj", water_frames(9))
    command = ["-m", "segnn_ase", "train", "--train", "train.traj", "--preset", "fast", "--hidden-irreps", "4x0e+4x1o"]
    command += ["--epochs", "500", "--device", "cpu", "--learning-rate", "0.01", "--rollout-steps", "0"]
    for more, told in (
        (["--train", "nowhere.traj"], "nowhere.traj"),  # by the first alone, which reads
        (["--cutoff", "-3"], "cutoff"),  # by each, before they meet
        (["--max-minutes", "0.001"], "stopped in epoch 1; the same command goes on from model.resume.pt"),
    ):
        done = run_together(tmp_path, 2, *command, *more)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if told in line and not line.startswith(("W", "E"))]
        assert len(lines) == 1, (told, done.stderr[-3000:])
    assert len(re.findall("2 processes share each step", done.stderr)) == 1
    done = run_together(tmp_path, 2, *command, "--batch-size", "1", "--out", "other.pt", "--max-minutes", "0.001")
    assert "cannot be cut into 2 equal parts" in done.stderr
