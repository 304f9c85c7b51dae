"""The numbers of a card: written from the model file and from results of benchmarks, never by hand.

A card has a place for each, between <!-- model --> and <!-- end -->, and so for the names of benchmarks in `PLACES`.
"""

import json
import re
from pathlib import Path

from ase.units import GPa

from segnn_ase.model.potential import Potential
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.train.settings import USUAL_MINUTES


def write_card(folder: Path, *results: str) -> None:
    """Write what the model file says into README.md, and what result files say."""
    path = folder / "README.md"
    card = filled(path.read_text(), "model", of_model(*load_with_metadata(folder / "model.pt")))
    for name in results:
        found = json.loads(Path(name).read_text())
        place = next((place for place in PLACES if place in Path(name).name), None)
        if place is None:
            raise ValueError(f"{name}: its name has none of {', '.join(PLACES)}, so the card has no place for it")
        rows = [row for row in found["rows"] if row.get("potential", folder.name) == folder.name]
        card = filled(card, place, PLACES[place](rows))
    path.write_text(card)


def filled(card: str, place: str, lines: list[str]) -> str:
    """The card with these lines in that place."""
    pattern = re.compile(rf"(?<=<!-- {place} -->\n).*?(?=^ *<!-- end -->$)", re.DOTALL | re.MULTILINE)
    if not pattern.search(card):
        raise ValueError(f"the card has no place for it: expected lines <!-- {place} --> and <!-- end -->")
    return pattern.sub(lambda _: "".join(f"{line}\n" for line in lines), card, count=1)


def of_model(potential: Potential, metadata: dict) -> list[str]:
    """How it was trained, where it is blind, and its errors on the test sets."""
    errors = {path: row for path, row in metadata["errors"].items() if path not in ("train", "valid")}
    told = [f"  - `{path}`: {errors_in_words(row)}" for path, row in errors.items()]
    return [of_training(potential, metadata), *of_core(potential), "- **Errors** on the test sets, RMSE / MAE:", *told]


def of_training(potential: Potential, metadata: dict) -> str:
    settings, model = metadata["training"]["training"], metadata["training"]["model"]
    weights = sum(p.numel() for p in potential.parameters())
    minutes = f"{settings.get('minutes') or USUAL_MINUTES:g} minutes"
    long = f"{settings['epochs']} epochs" if settings["epochs"] else minutes
    return (
        f"- **Training**: `train.toml`: preset `{model.get('preset', 'segnn')}` ({potential.config.hidden_irreps}, "
        f"{weights:,} weights), cutoff {potential.cutoff:g} Å, {long} on one core; kept is epoch {metadata['epoch']}, "
        "by the validation frames."
    )


def of_core(potential: Potential) -> list[str]:
    """The distances below which the repulsion acts."""
    if potential.core is None:
        return []
    names = potential.symbols
    pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
    told = ", ".join(f"{names[i]}-{names[j]} {float(potential.core[i, j]):.2f}" for i, j in pairs)
    return [f"- **Core**: a ZBL repulsion keeps atoms apart below {told} Å, 0.95 of the shortest in the data."]


def errors_in_words(errors: dict) -> str:
    kinds = (("forces", 1e3, "meV/Å", ".1f"), ("energy", 1e3, "meV/atom", ".2f"), ("stress", 1 / GPa, "GPa", ".2f"))
    told = [
        f"{name} {factor * errors[f'{name}_rmse']:{form}} / {factor * errors[f'{name}_mae']:{form}} {unit}"
        for name, factor, unit, form in kinds
        if errors.get(f"{name}_rmse") is not None
    ]
    return ", ".join(told) + "."


def of_conservation(rows: list[dict]) -> list[str]:
    """A line for each run of benchmarks/conservation.py."""
    told = ["- **Conservation**, after 7 ps of Langevin dynamics, by `benchmarks/conservation.py`:"]
    for row in rows:
        pressure = "" if row["pressure"] is None else f", {row['pressure']:.2f} GPa"
        slope = f"slope of the conserved energy {row['slope']:.1e} eV/atom/ps"
        how = f"{row['atoms']} atoms, {row['ps']:g} ps, {row['dtype']}, {row['timestep_fs']:g} fs"
        told.append(f"  - `{row['run']}`: {how}: {slope}, {row['temperature']:.0f} K{pressure}.")
    return told


def of_properties(rows: list[dict]) -> list[str]:
    """The table of benchmarks/properties.py."""
    head = "| property | this potential | DFT | experiment | unit | sources |"
    body = []
    for row in rows:
        cells = ["" if row[column] is None else f"{row[column]:.4g}" for column in ("model", "dft", "experiment")]
        body.append(f"| {row['property']} | {' | '.join(cells)} | {row['unit']} | {row['sources']} |")
    name = f"`benchmarks/properties.py {rows[0]['potential']}`"
    title = ["", "## Properties", "", f'By {name}; "data": of the frames that it learned from.', ""]
    return [*title, head, "|---|--:|--:|--:|---|---|", *body]


PLACES = {"conservation": of_conservation, "properties": of_properties}
