"""Files of models and trainings: tensors and plain values, read without trust."""
