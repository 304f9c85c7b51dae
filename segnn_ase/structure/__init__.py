"""Atoms as tensors: neighbour lists, graphs, the Verlet skin."""
