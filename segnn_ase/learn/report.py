"""The report of a loop: what was asked for, what each round found, what the potential is worth, in Markdown."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.base.figures import plot_rdf, plot_rounds
from segnn_ase.base.files import write_atomically
from segnn_ase.learn.comparison import Compared, Reweighted
from segnn_ase.learn.explore import Ran
from segnn_ase.learn.labelled import CONDITION, KEY, REASON, LabelledFrames
from segnn_ase.learn.references import resolve_reference
from segnn_ase.learn.rounds import STRONGEST, told_of_runs
from segnn_ase.learn.settings import LearnConfig
from segnn_ase.verify.certificate import Certificate

ENOUGH = 5.0  # frames, for a mean
UNITS_OF_ERRORS = {"forces": "meV/Å", "energy": "meV/atom", "stress": "meV/Å³"}


class Trial(NamedTuple):
    """Dynamics with the last potential."""

    ran: list[Ran]
    frames: list[Atoms]  # of these, labelled


class Speed(NamedTuple):
    """What a step costs."""

    atoms: int
    threads: int
    label: float  # s
    potential: float  # s


class Ended(NamedTuple):
    """What there is to tell."""

    rounds: list[dict[str, Any]]
    labelled: LabelledFrames
    frames: list[Atoms]  # that were trained on
    tried: Trial
    measured: dict[str, Any]  # `errors_on` what was not learned, of the potential that is written
    is_held: bool  # whether that is of the last round, for lack of labels
    compared: Compared
    certificate: Certificate
    speed: Speed
    why: str  # it ended before the aim was reached
    minutes: float


def write_loop_report(path: Path, config: LearnConfig, ended: Ended) -> None:
    """Write it, with a figure of the rounds beside it."""
    figure = path.with_suffix(".png")
    if ended.rounds:
        plot_rounds(figure, ended.rounds, config.aim.forces)
    sections = [
        of_loop(config, ended),
        [f"![errors and runs of the rounds]({figure.name})"] if ended.rounds else [],
        of_rounds(ended.rounds),
        of_frames(ended),
        of_potential(config, ended),
        of_comparison(ended.compared, path),
    ]
    write_atomically(path, "\n\n".join("\n".join(lines) for lines in sections if lines).encode() + b"\n")


def of_loop(config: LearnConfig, ended: Ended) -> list[str]:
    reference = resolve_reference(config.reference.calculator, config.reference.arguments)
    where = ", ".join(f"{kelvin:g} K" for kelvin in config.conditions.temperature)
    pressed = "".join(f", {gpa:g} GPa" for gpa in config.conditions.pressure)
    aims = [(value, UNITS_OF_ERRORS[name]) for name in UNITS_OF_ERRORS if (value := getattr(config.aim, name))]
    aim = ", ".join(f"{value:g} {unit}" for value, unit in aims)
    verdict = f"**not reached**: {ended.why}" if ended.why else "reached"
    given = ", ".join(f"{name} = {value!r}" for name, value in reference.arguments.items())
    return [
        f"# {Path(config.out).name}",
        "",
        f"- Reference: {config.reference.calculator}: {reference.about}" + (f" ({given})" if given else ""),
        f"- Licence of the reference: {reference.licence}. Whether it binds a potential that learned its labels is for "
        "you to find out.",
        *of_pretraining(config),
        f"- Structures: {', '.join(config.structures)}",
        f"- Asked for: {config.conditions.picoseconds:g} ps at {where}{pressed}, {config.conditions.starts} runs each, "
        f"without a stop, and an error of at most {aim} on frames of its own dynamics: {verdict}",
        f"- {ended.labelled.count} labels, of which {len(ended.labelled.failed)} failed; {len(ended.rounds)} rounds; "
        f"{ended.minutes:.1f} minutes",
    ]


def of_pretraining(config: LearnConfig) -> list[str]:
    given = config.pretraining
    if given is None:
        return []
    if given.reference is None:
        return [f"- Trainings go on from {given.model}"]
    first = resolve_reference(given.reference.calculator, given.reference.arguments)
    own = Path(config.pretrained).with_suffix(".report.md")
    told = f"- Trainings go on from a potential of {given.reference.calculator}: {first.about}, licence: "
    return [f"{told}{first.licence}; [report]({own.relative_to(Path(config.out).parent)})"]


def of_rounds(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = ["round", "trained on", "ps", "runs passed", "drawn", *UNITS_OF_ERRORS, "expected", "labels", "minutes"]
    lines = [
        "## Rounds",
        "",
        "Errors (rms: forces in meV/Å, energy in meV/atom, stress in meV/Å³) are of frames drawn at random from the "
        "round's own dynamics, labelled afterwards and not yet learned; what the potential itself expected of the "
        "forces stands beside. Behind ± stands what the few that are drawn scatter (one standard error).",
        "",
        f"| {' | '.join(head)} |",
        "|" + "--:|" * len(head),
    ]
    for row in rows:
        errors = [_with_scatter(row, name, 2 if name == "energy" else 1) for name in (*UNITS_OF_ERRORS, "expected")]
        cells = [row["round"], row["frames"], f"{row['picoseconds']:g}", passed_of(row), row["drawn"], *errors]
        lines.append(f"| {' | '.join(map(str, [*cells, row['labels'], row['minutes']]))} |")
    last = rows[-1]
    lines += ["", "In the last round, by condition (rms of forces, meV/Å): " + _listed(last["by_condition"])]
    stops = [f"- round {row['round']}: {stop}" for row in rows for stop in row["stops"]]
    late = [f"- round {row['round']}: {run}" for row in rows for run in row["late"]]
    lines += ["", "Dynamics were stopped:", "", *stops] if stops else []
    return [*lines, *(["", "Dynamics had no more time (a share of the minutes):", "", *late] if late else [])]


def passed_of(row: dict[str, Any]) -> str:
    """How many runs of a round were neither stopped nor out of time."""
    return f"{row['runs'] - len(row['stops']) - len(row['late'])} of {row['runs']}"


def of_frames(ended: Ended) -> list[str]:
    """Of what the set is made."""
    kinds = Counter(frame.info[REASON].partition(":")[0].partition(" by ")[0] for frame in ended.frames)
    where = Counter(frame.info.get(CONDITION, "before the dynamics") for frame in ended.frames)
    forces = np.concatenate([np.ravel(frame.get_forces()) for frame in ended.frames])
    strong = sum(np.abs(f.get_forces()).max() > STRONGEST for f in ended.labelled.frames.values())
    held = ended.measured["drawn"] if ended.is_held else 0
    own = sum(frame.info[KEY] not in ended.labelled.given for frame in ended.frames)
    others = len(ended.labelled.frames) - own - held - strong
    failed = [f"- no label for {key}: {reason}" for key, reason in ended.labelled.failed.items()]
    return [
        "## Frames",
        "",
        f"- {len(ended.frames)} were trained on, {held} of the last round held out to measure; "
        f"{strong} with forces above {STRONGEST:g} eV/Å are left out; {others} others are steps between those that are "
        "learned, controls of the reference, and what the potential was measured and compared on",
        f"- by reason: {_listed(kinds)}",
        f"- by condition: {_listed(where)}",
        f"- forces: rms {np.sqrt(np.mean(forces**2)):.3g}, largest {np.abs(forces).max():.3g} eV/Å",
        *failed,
    ]


def of_potential(config: LearnConfig, ended: Ended) -> list[str]:
    atoms, threads, label, own = ended.speed
    less = label >= own
    judged = [check for check in ended.certificate.checks if check.passed is not None]
    failed = ended.certificate.failed
    verdict = f"**fails**: {', '.join(failed)}" if failed else f"all {len(judged)} checks hold"
    ratio = label / own if less else own / label
    return [
        "## The potential that is written",
        "",
        *of_trial(ended),
        of_measured(ended),
        f"- `segnn verify` on the first structure: {verdict}. That is about symmetries, derivatives and conservation, "
        "not about the reference",
        f"- {atoms} atoms, {threads} threads: a label takes {1e3 * label:.3g} ms, the potential {1e3 * own:.3g} ms, "
        f"{ratio:.3g} times {'less' if less else 'more'}",
    ]


def of_trial(ended: Ended) -> list[str]:
    told = told_of_runs(ended.tried.ran)
    late = [f"- out of time: {run}" for run in told["late"]]
    return [f"- {passed_of(told)} runs of dynamics passed", *(f"- stopped: {stop}" for stop in told["stops"]), *late]


def of_measured(ended: Ended) -> str:
    measured = ended.measured
    if not measured["drawn"]:
        return "- **Nothing was measured**: no frames of dynamics were labelled"
    known = [name for name in UNITS_OF_ERRORS if measured[name] is not None]
    named = [f"{name} {_with_scatter(measured, name, 2)} {UNITS_OF_ERRORS[name]}" for name in known]
    whose = "the dynamics of the last round" if ended.is_held else "these dynamics"
    return (
        f"- Errors (rms) on {measured['drawn']} frames that were drawn at random from {whose}, and are not learned: "
        f"{', '.join(named)}; forces by condition: {_listed(measured['by_condition'])}"
    )


def of_comparison(compared: Compared, path: Path) -> list[str]:
    """With a figure of g(r) for each ensemble beside the report."""
    rows: list[str] = []
    if compared.minima:
        for name, theirs, own in zip(("volume / Å³/atom", "bulk modulus / GPa"), *compared.minima, strict=True):
            rows.append(f"| {name} | {theirs:.4g} | {own:.4g} | {100 * (own / theirs - 1):+.2f} % |")
    for n, (theirs, own) in enumerate(compared.modes):
        rows.append(f"| mode {n + 1} / cm⁻¹ | {theirs:.1f} | {own:.1f} | {own - theirs:+.1f} |")
    lines = ["## Beside the reference", ""]
    if rows:
        lines += [
            "Of the first structure, relaxed by the reference as far as it was: the minimum over volumes at fixed "
            "fractional coordinates, and vibrations along some of the potential's own modes (Γ of this cell; below "
            "zero: imaginary).",
            "",
            "| | reference | potential | off |",
            "|---|--:|--:|--:|",
            *rows,
            "",
        ]
    if compared.relaxed:
        found = compared.relaxed
        lines.append(
            f"- structure 1: {found.frames} minima of the potential, from frames of its dynamics, in their cells: "
            f"forces off by {found.forces:.1f} meV/Å there, relative energies by {found.off:.1f} meV; those of the "
            f"reference differ by {found.spread:.1f} meV (all rms)"
        )
    for n, ensemble in enumerate(compared.ensembles):
        lines += of_reweighted(ensemble, path.with_name(f"{path.stem.removesuffix('.report')}.rdf-{n + 1}.png"))
    return lines if rows or compared.relaxed or compared.ensembles else []


def of_reweighted(ensemble: Reweighted, figure: Path) -> list[str]:
    told = (
        f"- {ensemble.condition}: {ensemble.frames} frames of the potential's dynamics, weighed as the reference would "
        f"visit them: effective sample size {ensemble.effective:.1f}"
    )
    if ensemble.frames < ENOUGH:
        return [f"{told}, too few frames to tell"]
    if ensemble.effective < ENOUGH:
        return [f"{told}, too small to tell: energies of this cell are off by more than kT"]
    told += f"; that shifts the mean energy by {ensemble.shift:.2f} meV/atom"
    if not ensemble.curves:
        return [told]
    own = {pair: (r, g) for pair, (r, _, g) in ensemble.curves.items()}
    plot_rdf(figure, own, {pair: (r, g) for pair, (r, g, _) in ensemble.curves.items()})
    peaks = [
        f"{pair} {r[np.argmax(g)]:.2f} and {r[np.argmax(mine)]:.2f} Å, {g.max():.3g} and {mine.max():.3g}"
        for pair, (r, g, mine) in ensemble.curves.items()
        if g.any()
    ]
    told += f"; highest peaks of g(r) of the reference and the potential: {'; '.join(peaks)} ([figure]({figure.name}))"
    return [told]


def _with_scatter(row: dict[str, Any], name: str, digits: int) -> str:
    """That of the forces with what it scatters."""
    scatter = row.get("scatter") if name == "forces" else None
    return _digits(row[name], digits) + (f" ± {scatter:.1f}" if scatter is not None else "")


def _digits(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _listed(counts: dict) -> str:
    return "; ".join(f"{name}: {value:g}" for name, value in counts.items()) or "none"
