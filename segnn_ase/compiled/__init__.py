"""The network in compiled code: C on the CPU, Triton on a GPU, derived from one description and checked before use."""
