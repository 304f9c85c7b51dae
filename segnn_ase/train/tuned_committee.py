"""A committee that is fine-tuned: each member goes on from its own weights, on the same frames."""

from segnn_ase.store.model_file import Committee
from segnn_ase.train.committee import train_members
from segnn_ase.train.job import Training, TrainingData
from segnn_ase.train.report import printer
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.tuning import from_trained


def finetune_committee(config: TrainConfig, starts: Committee, deadline: float, *, progress: bool) -> dict:
    """Fine-tune each member of a committee, and put them into one file. Old structures are labelled by each member."""
    report = printer(progress)

    def begin(member: TrainConfig, k: int, data: TrainingData) -> Training:
        return from_trained(member, data, starts.potentials[k - 1], starts.metadata, report)

    return train_members(config, starts.potentials[0], begin, deadline, progress=progress)
