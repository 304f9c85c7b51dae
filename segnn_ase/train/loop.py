"""The training loop, to be read from top to bottom in `run_training`.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same command and, on
one CPU thread, ends with the same bits.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np

from segnn_ase.base import processes
from segnn_ase.base.errors import OutOfTime
from segnn_ase.base.files import clear_leftovers, progress_bar, stop_on_signal
from segnn_ase.train.job import OF_RUN, Learner, Training, output_files
from segnn_ase.train.report import printer, tensorboard, write_history
from segnn_ase.train.resume import Progress, load_state, save_state
from segnn_ase.train.schedule import come_to_rest, end_epoch
from segnn_ase.train.selection import better, keep
from segnn_ase.train.settings import LoopConfig, Looped
from segnn_ase.train.step import make_batches, make_learner, next_step
from segnn_ase.train.together import residuals_of_all
from segnn_ase.train.trial import find_out

GO_ON = "the same command goes on from"
STALLED = "the validation loss falls no more; the learning rate falls to zero until epoch"
BAR = "{percentage:3.0f}%|{bar}| epoch {n:.2f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def run_training(config: Looped, job: Training, deadline: float, *, progress: bool) -> dict:
    """Train from where the resume file stands to the end; returns the errors on every set.

    deadline: of `time.monotonic`, s. Raises OutOfTime after it and KeyboardInterrupt on a signal, when all is saved.
    """
    settings, files = config.training, output_files(config.out)
    first = processes.is_first()
    if first:
        clear_leftovers([config.out, *files.values()])
    learner, done, report = make_learner(job, settings), Progress(), printer(progress)
    if processes.on_first(files["resume"].is_file):
        done = load_state(files["resume"], job, learner)
    else:  # first of all files: wherever it is killed, there is a training to go on with
        save_state(files["resume"], job, learner, done)

    with stop_on_signal() as signals, tensorboard(files["tensorboard"], settings.tensorboard and first) as log_scalars:
        if done.epochs is None:
            save, stop = partial(save_state, files["resume"], job, learner, done), partial(end_trial, signals, deadline)
            find_out(job, settings, done, report, save=save, stop=stop, progress=progress)
        saved, bar = time.monotonic(), progress_bar(shown=progress, total=done.epochs, bar_format=BAR)
        with bar:
            bar.update(done.epoch)
            while done.epoch < done.epochs:
                train = job.data.learned_in(done.epoch, settings.seed)
                batches = make_batches(train, settings, epoch=done.epoch)
                while done.batch < len(batches):
                    next_step(learner, train, batches, settings, done, report)
                    bar.update(done.epoch + done.batch / len(batches) - bar.n)
                    stopped, late = processes.any_of(bool(signals), time.monotonic() > deadline)
                    if stopped or late or is_due(saved, settings):
                        save_state(files["resume"], job, learner, done)
                        saved = time.monotonic()
                    if stopped or late:
                        processes.wait_for_first()
                        reason = KeyboardInterrupt if stopped else OutOfTime
                        raise reason(f"stopped in epoch {done.epoch + 1}; {GO_ON} {files['resume']}")
                end_epoch(done)
                if done.epoch % settings.validate_every == 0 or done.epoch == done.epochs:
                    row, losses = validate(learner, job, settings, done, len(batches))
                    done.history.append(row)
                    bar.set_postfix_str(job.goal.summary(row), refresh=False)
                    if better(row, losses, done, settings):
                        keep(row, losses, done, settings)
                        save_model(config.out, job, learner, done)
                    if first:
                        write_history(files["csv"], done.history)
                        log_scalars(row)
                    if come_to_rest(done, settings):
                        report(f"epoch {done.epoch}: {STALLED} {done.epochs}")
                        bar.total = done.epochs
                done.loss = 0.0
                if is_due(saved, settings):
                    save_state(files["resume"], job, learner, done)
                    saved = time.monotonic()
        save_state(files["resume"], job, learner, done)
        if processes.any_of(bool(signals))[0]:  # in the last validation
            raise KeyboardInterrupt(f"stopped; {GO_ON} {files['resume']}")
    return processes.on_first(partial(conclude, config, job, learner, done, progress=progress))


def conclude(config: Looped, job: Training, learner: Learner, done: Progress, *, progress: bool) -> dict:
    """Write the last weights, and measure those that are kept."""
    save_model(output_files(config.out)["last"], job, learner, done)
    if not Path(config.out).exists():
        printer(progress)(
            f"{config.out} is not there: it was moved, or no validation loss was a number; the last weights are kept"
        )
        save_model(config.out, job, learner, done)
    return job.goal.finish(config, job, done.history, progress=progress)


def save_model(path: "str | Path", job: Training, learner: Learner, done: Progress) -> None:
    """With what it tells of its training. Of the first of several processes, which are all alike."""
    if processes.is_first():
        told = {**job.metadata, **{name: getattr(done, name) for name in OF_RUN}}
        job.goal.save(path, learner.averaged, metadata=told)


def end_trial(signals: list[int], deadline: float) -> None:
    """Raise an error when it is time to end."""
    stopped, late = processes.any_of(bool(signals), time.monotonic() > deadline)
    if stopped:
        raise KeyboardInterrupt("stopped in a trial of a learning rate, which the same command makes anew")
    if late:
        raise OutOfTime(
            "stopped in a trial of a learning rate, an eighth of the training at most, which the same command makes "
            "anew: raise max_minutes if it stops here again"
        )


def is_due(saved: float, settings: LoopConfig) -> bool:
    """Whether it is long ago that a resume file was written."""
    return time.monotonic() - saved > 60 * settings.save_minutes


def validate(learner: Learner, job: Training, settings: LoopConfig, done: Progress, n: int) -> tuple[dict, np.ndarray]:
    """A row of the history: where the training stands, errors on the validation set, and what the goal has to say.

    And the losses of each structure of the set.
    """
    row = {"epoch": done.epoch, "step": done.step, "lr": done.rate, "train_loss": done.loss / n, "spikes": done.spikes}
    found = residuals_of_all(learner.measure, job.data.chosen_by)
    row |= {f"valid_{name}": value for name, value in job.goal.errors(found).items()}
    what, where = (learner.averaged, job.data, settings, done.history), {"epoch": done.epoch, "epochs": done.epochs}
    return row | processes.on_first(partial(job.goal.log, *what, **where)), found["loss"]
