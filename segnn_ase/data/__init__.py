"""Labelled frames: reading them, reference energies, batches."""
