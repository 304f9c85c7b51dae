"""The most informative structures of many: what a potential would learn most from, and no two of a kind.

Features phi_i of the last interaction say what an atom teaches (`trust.uncertainty`). A structure adds
log det(1 + Phi A^-1 Phi^T) to what is known, A being the sum of phi phi^T over training atoms and structures chosen
before: the entropy of a linear model's weights that its labels remove (MacKay, Neural Comput. 4, 590 (1992)). It falls
with every structure that is like one chosen before, so that the greedy choice is diverse; for structures of one size it
is within 1 - 1/e of the best (Nemhauser, Wolsey, Fisher 1978). Taken for each atom, as labels of many cost more.
"""

import heapq
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from segnn_ase.base.errors import SEGNNError, StructureError, expect
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.convert import images_for, write_labelled
from segnn_ase.data.frames import structure_alone
from segnn_ase.structure.told import told_in, with_told

USUAL = 50  # structures
RIDGE = 1e-6  # of the mean diagonal, where nothing is known


def select_frames(
    model: str,
    paths: "str | Path | list",
    out: "str | Path",
    count: int | None = None,
    *,
    device: str = "auto",
    overwrite=False,
) -> list[str]:
    """Write the `count` most informative structures of files, as they are there; returns what was done, in lines.

    count: None for 50, or all where there are fewer.

    Raises FileNotFoundError, DataError, ConfigError for a count above that of the structures and for a bad name of
    the output, ModelFileError, and StructureError that names what cannot be evaluated.
    """
    out, images = images_for(out, paths, overwrite=overwrite)
    count = min(USUAL, len(images)) if count is None else count
    expect(1 <= count <= len(images), "n", count, f"1 to {len(images)}, the number of structures in the files")
    calculator = SEGNNCalculator(model, device=device, domain="ignore", allow_nonsmooth=True)
    chosen, gains = informative(atom_features(images, calculator), count, learned_form(calculator))
    left = write_labelled(out, [images[n][1] for n in chosen])
    lines = [f"{images[n][0]}: {gain:.3g}" for n, gain in zip(chosen, gains, strict=True)]
    lost = [f"left out, as extended XYZ cannot hold it: {', '.join(left)}"] if left else []
    return ["information per atom, the most informative first:", *lines, *lost, f"wrote {count} frames to {out}"]


def atom_features(images: Sequence[tuple[str, Atoms]], calculator: SEGNNCalculator) -> list[np.ndarray]:
    """Features (N, n) of the atoms of structures, each after its source. Raises StructureError with that."""
    found = []
    for source, atoms in images:
        alone = with_told(structure_alone(atoms, source), told_in(atoms, calculator.told_names))
        try:
            found.append(calculator.get_descriptors(alone).astype(np.float32))
        except SEGNNError as error:
            raise StructureError(f"{source}: {error}") from error
    return found


def learned_form(calculator: SEGNNCalculator) -> np.ndarray | None:
    """What the (first) potential has learned, (n, n); None where its file does not say."""
    uncertainty = calculator._potentials[0].uncertainty
    return None if uncertainty is None else uncertainty.of_training().double().cpu().numpy()


def informative(
    features: Sequence[np.ndarray],
    count: int,
    known: np.ndarray | None = None,
    learned: Sequence[np.ndarray] = (),
) -> tuple[list[int], list[float]]:
    """Numbers of the most informative structures, best first, and what each adds an atom.

    features: (N, n) of each; known (n, n): of what was learned before, and learned (N, n) of structures that will be
    besides. Fewer than `count` where there are fewer.
    """
    if not features:
        return [], []
    if known is None:
        mean = sum(float(np.square(f, dtype=float).sum()) for f in features) / sum(f.size for f in features)
        known = max(RIDGE * mean, 1e-300) * np.eye(features[0].shape[1])
    forms = [f.T @ f for f in (np.asarray(each, dtype=float) for each in learned)]
    inverse = torch.linalg.inv(torch.from_numpy(sum(forms, known)))
    heap = [(-gain_of(f, inverse), n, 0) for n, f in enumerate(features)]  # a gain is never less than it becomes
    heapq.heapify(heap)
    chosen: list[int] = []
    gains: list[float] = []
    while heap and len(chosen) < count:
        gain, n, when = heapq.heappop(heap)
        if when < len(chosen):
            heapq.heappush(heap, (-gain_of(features[n], inverse), n, len(chosen)))
            continue
        chosen.append(n)
        gains.append(-gain)
        phi = torch.from_numpy(features[n]).double()
        right = inverse @ phi.T
        inner = torch.eye(len(phi), dtype=torch.float64) + phi @ right
        inverse = inverse - right @ torch.linalg.solve(inner, right.T)
        inverse = 0.5 * (inverse + inverse.T)
    return chosen, gains


def gain_of(features: np.ndarray, inverse: torch.Tensor) -> float:
    """What a structure adds, for each of its atoms."""
    phi = torch.from_numpy(features).double()
    inner = torch.eye(len(phi), dtype=torch.float64) + phi @ inverse @ phi.T
    return float(torch.linalg.slogdet(inner).logabsdet) / len(phi)
