"""Training, fine-tuning and evaluation: the errors of a potential on labelled frames, made small."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["TrainConfig", "evaluate_files", "finetune", "train"]
__getattr__ = lazy_names(
    __name__, {"TrainConfig": "settings", "finetune": "start", "train": "start", "evaluate_files": "evaluation"}
)
