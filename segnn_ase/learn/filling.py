"""More frames for the last training: where labels are cheap beside it, as many of the dynamics as it passes often."""

from collections.abc import Sequence
from pathlib import Path

from ase import Atoms

from segnn_ase.learn.choice import evenly_spaced, is_sane
from segnn_ase.learn.explore import Ran
from segnn_ase.learn.labelled import KEY, asked_frame, decided
from segnn_ase.learn.rounds import PASSED, Rounds, round_folder
from segnn_ase.learn.state import Loop

PASSES = 45  # of the last training over its frames, at least: more frames are worth more than more passes
SHARE = 0.05  # of the minutes, for their labels
DIGITS = 4  # of positions, Å


def more_frames(loop: Loop, rounds: Rounds, folder: Path, minutes: float) -> list[str]:
    """Keys of frames of the last round's dynamics that are labelled besides, for a training of so many minutes; none
    where labels are limited or epochs are given."""
    config, state, labeller = loop.config, loop.state, loop.labeller
    if config.budget.labels is not None or config.training.epochs is not None:
        return []
    known = labeller.labelled.of([*rounds.keys, *rounds.held])
    most = minutes * usual_speed(loop) / PASSES - len(known)
    count = state.once(f"more of {folder.name}", lambda: max(int(min(most, loop.labels_within(SHARE))), 0))
    frames = decided(folder / "more.xyz", lambda: of_dynamics(rounds.ran, known, count, folder.name, len(state.rounds)))
    if not frames:
        return []
    loop.report(f"{len(frames)} more frames of these dynamics")
    labeller.label(frames)
    keys = [frame.info[KEY] for frame in frames]
    labeller.control(len(state.rounds), keys, f"{folder.name}/more")
    return keys


def usual_speed(loop: Loop) -> int:
    """Frames a minute, by the training of the last round that tells: one that was stopped does not."""
    names = [f"{PASSED} {round_folder(loop.config, n).name}" for n in range(len(loop.state.rounds), 0, -1)]
    return next((loop.state.decided[name] for name in names if name in loop.state.decided), 0)


def of_dynamics(ran: Sequence[Ran], known: Sequence[Atoms], count: int, prefix: str, round_: int) -> list[Atoms]:
    """So many, evenly spaced, without those that are known."""
    there = {frame.positions.round(DIGITS).tobytes() for frame in known}
    new = [(run, k) for run in ran for k, frame in enumerate(run.frames) if is_new(frame, there)]
    return [
        asked_frame(
            run.frames[k],
            f"{prefix}/more/{run.planned.key}/{k}",
            round_,
            run.planned.condition.name,
            "more of the dynamics",
        )
        for run, k in (new[n] for n in evenly_spaced(len(new), min(count, len(new))))
    ]


def is_new(frame: Atoms, there: set[bytes]) -> bool:
    return is_sane(frame) and frame.positions.round(DIGITS).tobytes() not in there
