"""The dataset doctor: what would spoil a training."""
