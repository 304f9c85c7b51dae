"""Programs that drive a simulation themselves and ask a potential for energies and forces."""
