"""Learned time-steppers: where bodies are a fixed time later, by one pass of a steerable network."""

from segnn_ase.base.lazy import lazy_names

__all__ = ["StepperTraining", "TimeStepper", "load_stepper", "simulate", "train_stepper", "write_motion"]
__getattr__ = lazy_names(
    __name__,
    {
        "StepperTraining": "settings",
        "TimeStepper": "stepper",
        "load_stepper": "files",
        "simulate": "systems",
        "train_stepper": "learning",
        "write_motion": "motion",
    },
)
